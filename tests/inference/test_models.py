"""Models of every kind are opened ready to answer, each with its base: inference/models.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from asking import Asker
from lora_folders import save_lora
from steered import IMAGE, generate, ids_of, load_llava, pictures, strengthen, words
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.models import AnsweringModel, open_model
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.pool.pool import BASE

HOW = {"device": "cpu"}
ROW = [1, *words(3), IMAGE, *words(4, seed=1)]


def answer(opened: AnsweringModel) -> list[list[int]]:
    return generate(
        opened.loaded.pool.model, ids_of(ROW), pictures(1).half(), do_sample=False, adapter_names=[opened.adapter]
    )


@pytest.fixture
def lora(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> Path:
    return save_lora(load_llava(tiny.llava), tmp_path / "llava-lora", None)


def test_bases_adapters_and_loras_answer_as_upstreams_loader_has_them(
    tiny: TinyLlava, ask: Asker, lora: Path, tmp_path: Path
) -> None:
    model = load_llava(tiny.llava)
    attachment = strengthen(attach(model, MoReS(rank=2, tokens="all")))
    described = describe(attachment)
    attachment.config = replace(described, base=replace(described.base, name_or_path=str(tiny.llava)))
    adapter = tmp_path / "llava-pets"
    save_adapter(model, adapter)

    kinds = {}
    answers = {}
    for path, base in ((tiny.llava, None), (adapter, None), (lora, str(tiny.llava))):
        opened = open_model(str(path), base, HOW)
        kinds[opened.kind] = opened.base
        _, alone, _ = ask.load(str(path), base)
        answers[opened.kind] = answer(opened)
        expected = generate(alone, ids_of(ROW), pictures(1).half(), do_sample=False)
        assert answers[opened.kind] == expected
    assert kinds == dict.fromkeys(("base", "mores", "lora"), str(tiny.llava))
    assert len({str(each) for each in answers.values()}) == 3


def test_a_lora_names_its_base_or_is_told_where_it_is(tiny: TinyLlava, lora: Path) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny.llava)}))
    assert open_model(str(lora), None, HOW).adapter == BASE

    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ArgumentsError, match="names no base; say where it is with --model-base"):
        open_model(str(lora), None, HOW)

    (lora / "adapter_config.json").write_text("[]")
    with pytest.raises(ArgumentsError, match="cannot be read"):
        open_model(str(lora), None, HOW)


def test_what_is_no_model_is_refused(tiny: TinyLlava, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="no model that can be loaded"):
        open_model(str(tmp_path), None, HOW)
    with pytest.raises(ArgumentsError, match="is no LLaVA"):
        open_model(str(tiny.llm), None, HOW)
