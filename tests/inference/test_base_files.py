"""A base is checked by its files, before torch is imported; the loading itself: test_base_model.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from base_folders import LLAVA, adapter_folder, base_folder

from llava_steering_plugin.adapters.stored.locate import locate
from llava_steering_plugin.errors import ArgumentsError, SteeringError, UpstreamError
from llava_steering_plugin.inference.base_files import check_adapters_fit, check_base
from llava_steering_plugin.inference.base_model import load_base
from llava_steering_plugin.inference.models import check_model


def test_the_files_of_a_llava_pass_also_in_several_parts(tmp_path: Path) -> None:
    assert check_base(str(base_folder(tmp_path / "whole")))["hidden_size"] == 64
    parts = base_folder(tmp_path / "parts")
    (parts / "model.safetensors").rename(parts / "model-1.safetensors")
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "model-1.safetensors"}}))
    check_base(str(parts))
    pickled = base_folder(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    check_base(str(pickled))


def test_whatever_is_wrong_with_the_files_is_one_error_that_names_them(tmp_path: Path) -> None:
    def broken(name: str, *, config: str | None = None, weights: bytes | None = b"", **others: str) -> str:
        folder = base_folder(tmp_path / name)
        if config is not None:
            (folder / "config.json").write_text(config)
        if weights is None:
            (folder / "model.safetensors").unlink()
        elif weights:
            (folder / "model.safetensors").write_bytes(weights)
        for file, text in others.items():
            (folder / file.replace("_index", ".safetensors.index.json")).write_text(text)
        return str(folder)

    half = (base_folder(tmp_path / "good") / "model.safetensors").read_bytes()[:-8]
    empty, fifo = tmp_path / "empty", base_folder(tmp_path / "fifo")
    empty.mkdir()
    (fifo / "config.json").unlink()
    os.mkfifo(fifo / "config.json")
    for path, said in {
        broken("no_json", config="{"): "config.json of .*no_json cannot be read",
        broken("deep", config="[" * 100_000): "config.json of .*deep cannot be read",
        broken("a_list", config="[]"): "names no model_type",
        broken("no_type", config="{}"): "names no model_type",
        broken("no_weights", weights=None): "no_weights holds no weights",
        broken("cut", weights=half): r"model\.safetensors is damaged or cut short",
        broken("odd_index", weights=None, model_index="[]"): r"index\.json is damaged",
        broken("lacks", weights=None, model_index='{"weight_map": {"a": "b.bin"}}'): r"lacks weights: b\.bin",
        str(empty): r"empty holds no model: it has no config\.json",
        str(tmp_path / "nowhere"): "there is no folder .*nowhere",
        str(fifo): "fifo cannot be read: it is a named pipe",
        str(tmp_path / "good" / "config.json"): r"config\.json is no folder",
        "x" * 300: "there is no folder x",
    }.items():
        with pytest.raises(UpstreamError, match=said) as refused:
            check_base(path, " THE ADVICE.")
        assert "THE ADVICE." in str(refused.value) or "weights" in said or "damaged" in said


def test_models_that_are_no_base_for_adapters_are_refused(tmp_path: Path) -> None:
    plain = base_folder(tmp_path / "plain")
    (plain / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArgumentsError, match=r"plain is no LLaVA: its config\.json has no mm_vision_tower"):
        check_base(str(plain))
    with pytest.raises(UpstreamError, match="names a vision tower that is not there: /no/such/tower"):
        check_base(str(base_folder(tmp_path / "blind", mm_vision_tower="/no/such/tower")))
    with pytest.raises(ArgumentsError, match=r"pets is an adapter, no base\. Give it with --adapters"):
        check_base(str(adapter_folder(tmp_path / "pets")))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("llava", "`llava-steering export {} DST` makes it"),
        ("qwen2_5_vl", "'qwen2_5_vl' has no such layout: use it fr"),
    ],
)
def test_a_base_in_the_layout_of_transformers_is_refused_with_what_to_do(kind: str, said: str, tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "hf")
    config = {"model_type": kind, "text_config": {"hidden_size": 64, "num_hidden_layers": 4}, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    adapters = {"pets": locate(adapter_folder(tmp_path / "pets"))}
    for check in (
        lambda: check_base(str(folder)),  # serve
        lambda: check_adapters_fit(adapters, str(folder), config),  # chat, eval, diagnose
        lambda: check_model(str(folder), None, bases=True),
        lambda: check_model(str(tmp_path / "pets"), str(folder), bases=False),
        lambda: load_base(str(folder), device="cpu", only_llava=True),
    ):
        with pytest.raises(ArgumentsError) as refused:
            check()
        assert "hf is a model of transformers' own class" in str(refused.value)
        assert said.format(folder) in str(refused.value)


def test_an_adapter_of_a_base_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    found = {name: locate(adapter_folder(tmp_path / name, hidden_size=4096)) for name in ("x", "y")}
    with pytest.raises(SteeringError) as refused:
        check_adapters_fit(found, "here", LLAVA)
    for name in found:
        assert f"{name!r} was trained on 4 layers of width 4096 (a/base); here has 4 of width 64" in str(refused.value)
    check_adapters_fit(found, "here", {"model_type": "llava_odd"})  # a config that does not say
