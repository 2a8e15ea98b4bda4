"""The base of chat, worker and eval: how it is recognised, and what is said if it cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llava import TinyLlava

from llava_steering_plugin.errors import ArgumentsError, SteeringError, UpstreamError
from llava_steering_plugin.inference.base_model import explained_failures, load_base, loading_name, read_base_config


def test_a_folder_without_a_model_is_refused_with_the_callers_advice(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r"is no model that can be loaded: .*config\.json.* Try another\.$"):
        read_base_config(str(tmp_path), " Try another.")


@pytest.mark.usefixtures("patched_llava")
def test_the_name_by_which_a_base_is_loaded_follows_its_config_and_not_its_folder() -> None:
    llava = {"model_type": "llava_llama", "mm_vision_tower": "a tower"}
    assert "llava" in loading_name("/models/pets", llava)
    assert "mistral" in loading_name("/models/pets", llava | {"model_type": "llava_mistral"})
    assert loading_name("/models/pets", {"model_type": "llama"}) == "pets"


@pytest.mark.usefixtures("patched_llava")
def test_a_plain_language_model_is_loaded_unless_only_a_llava_will_do(tiny: TinyLlava) -> None:
    with pytest.raises(ArgumentsError, match=r"is no LLaVA: its config\.json has no mm_vision_tower"):
        load_base(str(tiny.llm), device="cpu", only_llava=True)
    loaded = load_base(str(tiny.llm), device="cpu")
    assert loaded.processor is None and loaded.pool.names() == ["__base__"]


def test_a_base_whose_pictures_this_llava_would_crop_instead_is_refused_before_it_is_loaded(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    if "anyres_max" in (patched_llava / "llava/mm_utils.py").read_text():
        pytest.skip("LLaVA-NeXT cuts them")
    (tmp_path / "base").mkdir()
    described = json.loads((tiny.llava / "config.json").read_text()) | {"image_aspect_ratio": "anyres_max_9"}
    (tmp_path / "base/config.json").write_text(json.dumps(described))  # without weights: nothing could be loaded
    with pytest.raises(
        SteeringError, match=r"other pictures here .*'anyres_max_9', .* does not know .*LLaVA-NeXT does"
    ):
        load_base(str(tmp_path / "base"), device="cpu")


@pytest.mark.parametrize("error", [OSError("no file"), KeyError("a_key"), RuntimeError("CUDA out of memory")])
def test_a_failure_of_the_loader_becomes_one_message_that_says_what_to_check(error: Exception) -> None:
    with pytest.raises(
        SteeringError, match=rf"a/base cannot be loaded: {type(error).__name__}: .*--load-4bit"
    ) as refused:
        with explained_failures("a/base"):
            raise error
    assert refused.value.__cause__ is error


def test_other_errors_of_ours_stay_as_they_are() -> None:
    with pytest.raises(UpstreamError, match=r"^it is not there$"), explained_failures("a/base"):
        raise UpstreamError("it is not there")
