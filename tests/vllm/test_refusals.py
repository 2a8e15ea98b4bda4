"""What in an engine's settings excludes MoReS is said; versions of vLLM that were not tried are left alone.

Covers `vllm/refusals.py`, and `vllm/plugin.py` where no vLLM is installed.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm_fixtures import Shared

from llava_steering_plugin.vllm import plugin
from llava_steering_plugin.vllm.refusals import ANYWAY, TARGETS, asked_for, refused


def settings(**changed: Any) -> SimpleNamespace:
    """The parts of a VllmConfig that are looked at; names with two underscores are of a part."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(architectures=["LlavaForConditionalGeneration"], enforce_eager=False),
        "device_config": SimpleNamespace(device_type="cpu"),
        "lora_config": SimpleNamespace(target_modules=None),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, enable_dbo=False, ubatch_size=0),
        "speculative_config": None,
    }
    for name, value in changed.items():
        part, inside, entry = name.partition("__")
        if inside:
            setattr(parts[part], entry, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_config__architectures": ["LlavaNextForConditionalGeneration"]}, "the model is a LlavaNext"),
        ({"lora_config": None}, "--enable-lora"),
        ({"lora_config__target_modules": ["steering", "q_proj"]}, "does not name steering_tokens"),
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"device_config__device_type": "cuda"}, "--enforce-eager"),
    ],
)
def test_each_setting_that_excludes_mores_is_named(
    changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ANYWAY, raising=False)
    assert refused(settings()) == []
    (problem,) = refused(settings(**changed))
    assert said in problem


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")
def test_these_are_the_settings_of_the_installed_vllm(shared: Shared) -> None:
    from vllm.engine.arg_utils import EngineArgs

    given = {"dtype": "float32", "max_model_len": 256, "enable_lora": True, "max_lora_rank": 8}
    config = EngineArgs(model=str(shared.base), enforce_eager=True, **given).create_engine_config()
    assert refused(config) == []
    for name, value in (
        ("pipeline_parallel_size", 2),
        ("enable_dbo", True),
        ("ubatch_size", 2),
        ("prefill_context_parallel_size", 2),
    ):
        parallel = config.parallel_config
        before = getattr(parallel, name)
        setattr(parallel, name, value)
        assert len(refused(config)) == 1, name
        setattr(parallel, name, before)


def test_cuda_graphs_can_be_tried_at_ones_own_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ANYWAY, "1")
    assert refused(settings(device_config__device_type="cuda")) == []


def test_an_engine_is_for_mores_where_its_targets_say_so() -> None:
    assert not asked_for(settings())
    assert not asked_for(settings(lora_config__target_modules=["q_proj"]))
    assert asked_for(settings(lora_config__target_modules=["q_proj", *TARGETS]))


def test_a_version_that_was_not_tried_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = ModuleType("vllm")  # without ModelRegistry: whoever asks for it fails
    other.__version__ = "9.8.7+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", other)
    monkeypatch.delenv(ANYWAY, raising=False)
    logger = logging.getLogger("vllm.llava_steering")  # vLLM's, if it is there, hands nothing on
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, logger.name)
    plugin.register()
    assert "this is vLLM 9.8.7" in caplog.text and ANYWAY in caplog.text
    monkeypatch.setenv(ANYWAY, "1")
    with pytest.raises(ImportError, match="ModelRegistry"):
        plugin.register()
