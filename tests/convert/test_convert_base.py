"""Converted checkpoints and their base (`convert/backbone.py`): compared, never mistaken, and with all it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from released_checkpoints import (
    METHODS,
    edit_json,
    edit_tensors,
    golden_base,
    mixlora_over,
    mores_over,
    refusal,
    said,
    same_adapter,
)
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process
from transformers import LlamaForCausalLM

from llava_steering_plugin import load_adapter
from llava_steering_plugin.adapters.stored.folder import ADAPTER
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.convert.conversion import Conversion, convert
from llava_steering_plugin.errors import ArgumentsError, BaseMismatch, SteeringError

# Another base


@pytest.fixture
def other_base(tmp_path: Path) -> Callable[[str], str]:
    """The golden base with another embedding."""

    def changed(method: str) -> str:
        folder = Path(shutil.copytree(golden_base(method), tmp_path / "other_base"))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return changed


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_checkpoint_does_not_load_on_another_base(
    converted: dict[str, Conversion], other_base: Callable[[str], str], method: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(other_base(method))
    with pytest.raises(BaseMismatch, match="embedding rows that identify the base differ"):
        load_adapter(model, converted[method].folder)


def test_a_checkpoint_that_repeats_its_base_is_not_converted_for_another(
    released: Callable[[str], Path], other_base: Callable[[str], str]
) -> None:
    message = refusal(released("mixlora"), other_base("mixlora"), BaseMismatch)
    assert "1 of the 21 tensors" in message and "model.embed_tokens.weight has other values" in message


@pytest.mark.parametrize(("method", "other"), [("mores", "mixlora"), ("mixlora", "mores")])
def test_a_base_of_other_layers_is_refused(released: Callable[[str], Path], method: str, other: str) -> None:
    message = refusal(released(method), golden_base(other), BaseMismatch)
    assert "layer 1, the last of 2" in message if method == "mores" else "no factors for it" in message


def test_rounding_to_half_precision_is_no_other_base(released: Callable[[str], Path], tmp_path: Path) -> None:
    folder = released("mixlora")
    whole = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: value.bfloat16() for name, value in whole.items()}, folder / "pytorch_model.bin")
    assert "21 tensors" in convert(folder, tmp_path / "done", golden_base("mixlora")).checks[0]


def test_without_a_base_mores_says_that_it_needs_one(released: Callable[[str], Path]) -> None:
    folder = released("mores")
    assert "--base" in refusal(folder, None, ArgumentsError)
    assert "nobody/nothing" in refusal(folder, "nobody/nothing", SteeringError)
    (folder / "language_model").mkdir()
    shutil.copy(Path(golden_base("mores")) / "config.json", folder / "language_model")
    assert "holds no embedding" in refusal(folder, "nobody/nothing")


def test_mixlora_needs_no_base_on_this_machine(
    converted: dict[str, Conversion], released: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = released("mixlora")
    assert "--base" in refusal(folder, None, ArgumentsError)
    edit_json(folder / "config.json", _name_or_path="somebody/vicuna-tiny")
    done = convert(folder, tmp_path / "done")
    assert done.config.base.name_or_path == "somebody/vicuna-tiny"
    assert "not on this machine" in said(done) and "not on this machine" not in said(converted["mixlora"])
    assert same_adapter(done.folder, converted["mixlora"].folder)


# Whole checkpoints


def load_with_upstream(folder: Path) -> tuple[Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(folder), None, get_model_name_from_path(str(folder)), device="cpu")[:2]


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_checkpoint_brings_its_projector_and_loads_through_upstreams_loader(
    llava_copies: object, tiny: TinyLlava, tmp_path: Path, method: str
) -> None:
    projector = {name: value.float() for name, value in torch.load(tiny.projector, weights_only=True).items()}
    seen = {"mm_vision_tower": str(tiny.tower), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 64}
    if method == "mixlora":
        mixlora_over(tiny.llm, tmp_path / "whole", projector)
        edit_json(tmp_path / "whole" / "config.json", **seen, mm_vision_select_layer=-2)
    else:
        connector = {name.replace("model.mm_projector", "_connector"): value for name, value in projector.items()}
        vision = {"vision_feature_layer": -2, "vision_config": {"hidden_size": 64}}
        whole = {"vision_model_name_or_path": str(tiny.tower), "connector_type": "mlp2x_gelu", **vision}
        mores_over(tiny.llm, tmp_path / "whole", connector, whole)
    done = convert(tmp_path / "whole", tmp_path / "adapter", conversation="v1")
    assert done.extras == tuple(sorted(projector)) and done.config.base.name_or_path == str(tiny.llm)
    assert "of the base in the checkpoint have the values" in done.checks[0]
    _, model = load_with_upstream(done.folder)
    for name, value in projector.items():
        torch.testing.assert_close(model.get_parameter(name).float(), value, atol=1e-3, rtol=1e-3)
    # A base that has that projector already is not given it again.
    assert not convert(tmp_path / "whole", tmp_path / "second", str(tiny.llava)).extras
    assert not convert(tmp_path / "whole", tmp_path / "third", projector=False).extras


def test_tokens_that_training_added_come_along(tiny: TinyLlava, tmp_path: Path) -> None:
    mixlora_over(tiny.llm, tmp_path / "whole", {})
    path = tmp_path / "whole" / "pytorch_model.bin"
    whole = torch.load(path, weights_only=True)
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    rows, width = whole[names[0]].shape
    added = {name: torch.randn(2, width) for name in names}
    torch.save(whole | {name: torch.cat([whole[name], value]) for name, value in added.items()}, path)
    assert "added_tokens.json" in refusal(tmp_path / "whole", None)
    tokens = {"<im_end>": rows + 1, "<im_start>": rows, "<unk>": 0}
    (tmp_path / "whole" / "added_tokens.json").write_text(json.dumps(tokens))
    done = convert(tmp_path / "whole", tmp_path / "adapter")
    assert done.config.added_tokens == {"<im_start>": rows, "<im_end>": rows + 1}
    model = LlamaForCausalLM.from_pretrained(tiny.llm)
    load_adapter(model, done.folder)
    for layer, value in zip((model.get_input_embeddings(), model.get_output_embeddings()), added.values(), strict=True):
        torch.testing.assert_close(layer.weight[rows:].float(), value, atol=1e-2, rtol=1e-2)


def test_a_converted_checkpoint_trains_on_and_its_routers_stay_as_the_authors_left_them(
    patched_llava: Path, tiny: TinyLlava, tmp_path: Path
) -> None:
    mixlora_over(tiny.llava, tmp_path / "whole", {})
    before = read(convert(tmp_path / "whole", tmp_path / "adapter").folder).section(ADAPTER)
    flags = {"adapter_path": tmp_path / "adapter", "freeze_mm_mlp_adapter": True}
    train_in_process(train_flags(tiny, tmp_path / "further", flags))
    after = read(tmp_path / "further")
    assert after.config.settings["variant"] == "released"
    assert after.section(ADAPTER).keys() == before.keys()
    for name, value in after.section(ADAPTER).items():
        assert torch.equal(value, before[name]) == (".router_" in name), name


def test_trained_tensors_without_a_place_are_named(released: Callable[[str], Path], tmp_path: Path) -> None:
    folder = released("mixlora")
    edit_tensors(folder / "pytorch_model.bin", base_model__model__task_encoder__weight=torch.zeros(2))
    assert "task_encoder.weight" in said(convert(folder, tmp_path / "done", golden_base("mixlora")))
