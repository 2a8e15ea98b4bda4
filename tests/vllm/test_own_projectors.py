"""Adapters with a projector of their own: each image is projected by that of its request, and never by another's.

Covers `vllm/projector.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_fixtures import Engine, Shared, differing

from llava_steering_plugin.vllm.adapter import SlotAdapter
from llava_steering_plugin.vllm.copies import digest_of

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def test_every_projector_changes_at_least_half_of_the_answers(own: Shared) -> None:
    for name in ("one", "other", "half"):
        for without in (None, "none"):
            count = differing(own.expected[name], own.expected[without])
            assert 2 * count >= len(own.prompts), (name, without, count)
    assert 2 * differing(own.expected["one"], own.expected["other"]) >= len(own.prompts)


def test_mixed_batches_answer_as_transformers_cold_and_from_the_caches(engine: Engine, own: Shared) -> None:
    assert len(own.adapters) > engine.SLOTS
    pairs = [(name, number) for number in range(len(own.prompts)) for name in own.expected]
    prompts = [own.prompts[number] for _, number in pairs]
    requests = [own.request(name) for name, _ in pairs]
    expected = [own.expected[name][number] for name, number in pairs]
    engine.llm.reset_prefix_cache()
    assert engine.answers(prompts, requests) == expected
    assert engine.answers(prompts, requests) == expected  # keys and values are cached
    engine.llm.reset_prefix_cache()
    assert engine.answers(prompts, requests) == expected  # image features are


def test_a_picture_is_projected_once_by_each_projector(
    engine: Engine, own: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.vllm.projector import SteeredProjector

    passes = []
    forward = SteeredProjector.forward

    def counted(self: SteeredProjector, features: torch.Tensor) -> torch.Tensor:
        passes.append(features.shape)
        return forward(self, features)

    monkeypatch.setattr(SteeredProjector, "forward", counted)
    engine.llm.llm_engine.reset_encoder_cache()
    for name, times in (("none", 1), (None, 0), ("one", 1), ("one", 0), ("other", 1), ("half", 1), ("none", 1)):
        engine.llm.reset_prefix_cache()
        passes.clear()
        assert engine.answers(own.prompts[:1], [own.request(name)]) == own.expected[name][:1], name
        assert len(passes) == times, name


def test_a_projector_that_was_trained_again_projects_as_the_new_one(
    engine: Engine, own: Shared, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "pets"
    for name in ("one", "other"):
        shutil.copytree(own.adapters[name], folder, dirs_exist_ok=True)
        request = LoRARequest("pets", 75, str(folder), load_inplace=True)
        engine.llm.llm_engine.add_lora(request)
        found = engine.answers(own.prompts, [request] * len(own.prompts))
        assert found == own.expected[name], name


def test_features_are_cached_by_the_contents_of_the_adapter(engine: Engine, own: Shared) -> None:
    from llava_steering_plugin.vllm.requests import admission_of

    processor = engine.llm.llm_engine.input_processor
    names = {
        name: processor._get_mm_identifier("image", admission_of(processor).admit(own.request(name)))
        for name in own.expected
    }
    assert names[None] == names["none"] == "image"  # those of the base, computed once
    for name in ("one", "other", "half"):
        assert names[name] == f"{digest_of(own.adapters[name])}:image"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"enable_tower_connector_lora": False}, "start vLLM with --enable-tower-connector-lora"),
        ({"enable_mm_embeds": True}, "with --enable-mm-embeds vLLM does not always say whose"),
        ({"limit_mm_per_prompt": {"image": 0}}, "takes no images"),
    ],
)
def test_an_engine_that_cannot_project_by_them_refuses_them(changed: dict[str, Any], said: str, own: Shared) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError

    from llava_steering_plugin.vllm.requests import Admission

    usual = {"dtype": "float32", "max_model_len": 256, "enable_lora": True, "enable_tower_connector_lora": True}
    config = EngineArgs(model=str(own.base), enforce_eager=True, **(usual | changed)).create_engine_config()
    with pytest.raises(VLLMValidationError, match=said):
        Admission(config).admit(own.request("one"))
    assert Admission(config).admit(own.request("none")).lora_path.startswith(str(own.adapters["none"]))


def test_memory_that_adapters_are_kept_in_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_steering_plugin.vllm import worker

    linear = torch.zeros(10, 10)
    large, small = (SlotAdapter({}, torch.zeros(0), (linear, second)) for second in (linear, None))
    assert (large.size, small.size) == (800, 400)
    monkeypatch.setattr(worker, "MOST_KEPT", 1000)
    kept: dict[str, SlotAdapter] = {}
    for name, adapter in (("a", small), ("b", small), ("c", small), ("d", large)):
        worker.keep(kept, name, adapter)
        assert "".join(kept) == {"a": "a", "b": "ab", "c": "bc", "d": "d"}[name]
    monkeypatch.setattr(worker, "MOST_KEPT", 0)
    worker.keep(kept, "e", large)
    assert list(kept) == ["e"]  # the one that is asked for
