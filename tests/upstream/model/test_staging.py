"""What LLaVA-NeXT's loader is given, and does not do itself; tests/next does all of it with its real loader.

Covers `upstream/model/staging.py`, `upstream/model/towers.py`, `upstream/model/loader_calls.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_llava import TinyLlava
from transformers import LlamaConfig

from llava_steering_plugin.errors import BaseMismatch
from llava_steering_plugin.upstream.model.loader_calls import place_like_llava, takes_whole_checkpoints_alone
from llava_steering_plugin.upstream.model.staging import stage_whole
from llava_steering_plugin.upstream.model.towers import own_towers, stays_empty, tensor_names

TOWER, OTHER = "model.vision_tower.vision_tower.post_layernorm.weight", "lm_head.weight"


def llavas(model_path: Any, model_base: Any, model_name: Any, device_map: Any = "auto", device: Any = "cuda") -> None:
    """Takes what LLaVA's loader takes."""


def nexts(
    model_path: Any,
    model_base: Any,
    model_name: Any,
    device_map: Any = "auto",
    attn_implementation: Any = "flash_attention_2",
    overwrite_config: Any = None,
    **kwargs: Any,
) -> None:
    """Takes what LLaVA-NeXT's loader takes."""


def placed(load: Callable[..., None], **given: Any) -> dict[str, Any]:
    call = inspect.signature(load).bind("path", None, "name", **given)
    place_like_llava(load, call)
    return {name: value for name, value in call.arguments.items() if not name.startswith("model_")}


def test_llavas_own_loader_gets_what_it_was_given() -> None:
    assert placed(llavas, device="cpu") == {"device": "cpu"}
    assert not takes_whole_checkpoints_alone(llavas) and takes_whole_checkpoints_alone(nexts)


def test_a_device_becomes_a_map_and_flash_attention_is_left_out_on_the_cpu() -> None:
    sdpa = {"attn_implementation": "sdpa", "kwargs": {}}
    assert placed(nexts, device="cpu") == {"device_map": "auto", **sdpa}
    assert placed(nexts, device="cuda:1", attn_implementation="eager") == {
        "device_map": {"": "cuda:1"},
        "attn_implementation": "eager",
        "kwargs": {},
    }
    assert placed(nexts, device_map={"": "cpu"})["device_map"] == {"": "cpu"}


@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("held", [True, False])
def test_a_tower_stays_empty_only_where_the_checkpoint_holds_none(tmp_path: Path, kind: str, held: bool) -> None:
    tensors = {OTHER: torch.zeros(1), **({TOWER: torch.zeros(1)} if held else {})}
    if kind == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    elif kind == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tensor_names(str(tmp_path)) == tensors.keys()
    config = LlamaConfig(_name_or_path=str(tmp_path), name_or_path=str(tmp_path))
    assert not stays_empty(config)
    with own_towers():
        assert stays_empty(config) == (not held)


def test_nothing_is_decided_for_flags_or_for_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with own_towers():
        assert not stays_empty(object())
        assert not stays_empty(LlamaConfig(name_or_path=str(tmp_path)))
        assert not stays_empty(LlamaConfig(name_or_path="nobody/has-this"))


def test_a_plain_language_model_is_laid_out_as_one_checkpoint(tiny: TinyLlava, tmp_path: Path) -> None:
    described = json.loads((tiny.llm / "config.json").read_text())
    trained = {**described, "model_type": "llava_llama", "vocab_size": 3, "mm_use_im_start_end": True}
    stage_whole(tmp_path, trained, described, str(tiny.llm))
    laid_out = json.loads((tmp_path / "config.json").read_text())
    assert laid_out == {
        **trained,
        "vocab_size": described["vocab_size"],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in tiny.llm.iterdir()}
    assert (tmp_path / "model.safetensors").resolve() == (tiny.llm / "model.safetensors").resolve()
    with pytest.raises(BaseMismatch, match="nobody/has-this cannot be fetched"):
        stage_whole(tmp_path / "other", trained, described, "nobody/has-this")
