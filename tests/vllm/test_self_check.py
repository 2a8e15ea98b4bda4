"""An engine checks at its start that images are steered and texts are not; it does not start where that is not so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_bases import ROOT
from vllm_fixtures import Engine, Shared

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def core_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core


def test_a_good_engine_passes_and_is_left_as_it_was(engine: Engine, shared: Shared) -> None:
    from llava_steering_plugin.vllm.self_check import NUMBER, check

    assert check(core_of(engine))
    assert NUMBER not in core_of(engine).list_loras()
    for name in (None, "all-4"):
        assert engine.answers(shared.prompts[:2], [shared.request(name)] * 2) == shared.expected[name][:2]


def test_a_lost_mask_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_steering_plugin.vllm.layers import TokensInSlots
    from llava_steering_plugin.vllm.self_check import SelfCheckFailed, check

    monkeypatch.setattr(TokensInSlots, "find", lambda self, digits, is_image: self.base_layer.slots.fill_(-1))
    with pytest.raises(SelfCheckFailed, match=r"does nothing in this engine.*docs/vllm\.md.*LLAVA_STEERING_VLLM_CHECK"):
        check(core_of(engine))


def test_a_mask_that_is_left_from_an_older_batch_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_steering_plugin.vllm.layers import TokensInSlots
    from llava_steering_plugin.vllm.self_check import SelfCheckFailed, check

    assert check(core_of(engine))  # behind which nothing is left
    find = TokensInSlots.find

    def only_for_images(self: Any, digits: Any, is_image: Any) -> None:
        if digits is not None:
            find(self, digits, is_image)

    monkeypatch.setattr(TokensInSlots, "find", only_for_images)
    with pytest.raises(SelfCheckFailed, match="changes texts"):
        check(core_of(engine))


def test_a_check_that_cannot_be_made_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_steering_plugin.vllm import self_check

    monkeypatch.setattr(self_check, "prompts", lambda config: (_ for _ in ()).throw(AttributeError("gone")))
    with pytest.raises(self_check.SelfCheckFailed, match=r"could not be checked \(AttributeError: gone\)"):
        self_check.check(core_of(engine))


START = """
from vllm import LLM
LLM({base!r}, dtype="float32", enable_lora=True, max_lora_rank=8, max_model_len=256, max_num_seqs=4,
    lora_target_modules=["steering", "steering_tokens"], enforce_eager=True)
print("it is up")
"""
# Of every process that Python starts with this on its path.
BROKEN = """
import wrapt

def lose_the_mask(layers):
    layers.TokensInSlots.find = lambda self, digits, is_image: self.base_layer.slots.fill_(-1)

wrapt.register_post_import_hook(lose_the_mask, "llava_steering_plugin.vllm.layers")
"""


def started(shared: Shared, spawned: bool, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Start an engine, in the process that asks for it or in one that is spawned, as vLLM's server has it on a CPU."""
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(spawned)), "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return subprocess.run(
        [sys.executable, "-c", START.format(base=str(shared.base))],
        env=os.environ | settings | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("spawned", [False, True])
def test_an_engine_that_fails_does_not_start(spawned: bool, shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    done = started(shared, spawned, tmp_path)
    assert done.returncode != 0 and "it is up" not in done.stdout
    assert "MoReS does nothing in this engine" in done.stdout + done.stderr


def test_a_spawned_engine_that_passes_starts(shared: Shared) -> None:
    done = started(shared, True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "it is up" in done.stdout
    assert said.count("MoReS works in this engine: an image is steered, a text is not") == 1
