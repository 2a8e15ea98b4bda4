"""Upstream's `load_pretrained_model` with an adapter and a base that is given: it wins, and it is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_llava_config, set_header
from tiny_llava import TinyLlava
from training_runs import with_other_weights

from llava_steering_plugin.errors import AdapterError, BaseMismatch
from llava_steering_plugin.modes.base import default_dtype

pytest_plugins = ["steered_fixtures"]


def load(path: Path | str, base: Path | str | None = None, **options: Any) -> Any:
    """As upstream's programs load; returns the model."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(path))
    return load_pretrained_model(str(path), base and str(base), name, device="cpu", **options)[1]


@pytest.fixture
def other_base(tiny: TinyLlava, tmp_path: Path) -> Path:
    return with_other_weights(tiny.llava, tmp_path / "other")


def test_another_base_is_refused_and_the_right_one_named(tiny: TinyLlava, saved: Path, other_base: Path) -> None:
    with pytest.raises(BaseMismatch) as error:
        load(saved, other_base)
    for expected in (str(saved), str(other_base), "same shape, other weights", f"Load it on {tiny.llava}"):
        assert expected in str(error.value)


def test_a_base_that_is_gone_is_an_error_that_says_how_to_name_another_place(
    tiny: TinyLlava, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseMismatch, match=r"/nowhere/base, which cannot be found.*--model-base"):
        load(saved, "/nowhere/base")
    shutil.copytree(tiny.llava, tmp_path / "moved")
    assert load(saved, tmp_path / "moved").llava_steering.mode.name == "mores"


@pytest.mark.parametrize("content", ["[]", "5", "{"])
def test_an_adapter_whose_llava_config_holds_no_settings_is_damaged_on_whatever_base(
    tiny: TinyLlava, saved: Path, content: str
) -> None:
    set_header(saved, llava_config=content)
    for base in (None, tiny.llm):
        with pytest.raises(AdapterError, match=r"header of .* is damaged .*Copy the adapter again"):
            load(saved, base)
    set_header(saved, llava_config=None)  # as older versions wrote it
    (saved / "config.json").write_text(content)
    for base in (None, tiny.llm):
        with pytest.raises(AdapterError, match=r"config\.json is damaged .*Copy the adapter again"):
            load(saved, base)


def test_a_copy_of_the_llava_config_that_a_crash_left_behind_is_not_read(saved: Path) -> None:
    change_llava_config(saved, image_aspect_ratio="square")  # the base says "pad"
    stale = json.loads((saved / "config.json").read_text()) | {"image_aspect_ratio": "anyres"}
    for copy in (json.dumps(stale), "{", None):
        if copy is None:
            (saved / "config.json").unlink()
        else:
            (saved / "config.json").write_text(copy)
        assert load(saved).config.image_aspect_ratio == "square"


@pytest.mark.parametrize("content", ["[]", "{}", "{"])
def test_a_base_whose_config_json_describes_no_model_is_a_mismatch(saved: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseMismatch, match=r"cannot be found or read: .*--model-base"):
        load(saved, tmp_path)


def test_an_adapter_given_as_the_base_of_an_adapter_is_refused(tiny: TinyLlava, saved: Path) -> None:
    with pytest.raises(BaseMismatch, match=rf"is an adapter itself.*--model-base; .* trained on {tiny.llava}"):
        load(saved, saved)


def test_a_checkpoint_loads_by_its_path_as_the_run_does(saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "run" / "checkpoint-20"))
    parameters = [load(path).llava_steering.parameters() for path in (saved, f"{checkpoint}/")]
    assert all(torch.equal(value, parameters[1][name]) for name, value in parameters[0].items())


def test_a_wrong_argument_is_upstreams_own_complaint_and_not_ours(saved: Path) -> None:
    from llava.model.builder import load_pretrained_model

    with pytest.raises(TypeError, match="load_pretrained_model"):
        load_pretrained_model(str(saved))
    with pytest.raises(TypeError):
        load_pretrained_model(str(saved), None, "name", False, False, "auto", "cpu", "one too many", "and another")


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
def test_a_load_that_fails_inside_transformers_leaves_the_default_dtype_as_it_was(
    saved: Path, default: torch.dtype
) -> None:
    with default_dtype(default):
        with pytest.raises(TypeError, match="multimodal"):
            load(saved, multimodal=True)  # as lmms-eval tries first
        assert torch.get_default_dtype() == default
        parameters = load(saved).llava_steering.parameters()
        assert torch.get_default_dtype() == default
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
