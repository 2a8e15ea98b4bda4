"""MoReS answers alike where vLLM compiles the model: a CPU is made to, which it leaves out where LoRA is on.

Covers `vllm/layers.py`, `vllm/model.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_bases import ROOT
from vllm_fixtures import Shared

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def test_a_compiled_model_answers_a_mixed_batch_as_transformers(shared: Shared, tmp_path: Path) -> None:
    adapters = json.dumps({name: str(folder) for name, folder in shared.adapters.items()})
    words = [shared.base, shared.llava.parent / "images", adapters]
    # Caches of its own, so that nothing is there that was compiled before.
    caches = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/vllm_compiled.py", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | caches,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answers"] == {name or "": answers for name, answers in shared.expected.items()}
    # The decoder, once for all batches, by torch's compiler, and as one graph: with the steering in it.
    assert (found["backend"], found["models"], found["compiled"], found["compiled again"]) == ("inductor", 1, 1, 0)
    assert found["library calls"] > 0 and not found["graph breaks"]
