"""ZeRO-2 under transformers' Trainer, on one rank of the CPU: it trains, saves and resumes the adapter.

Covers `training/trainer.py` and `training/deepspeed.py`. Several ranks are in `tests/training/test_deepspeed.py`, under
LLaVA's trainer: accelerate 1.15 counts one process where DeepSpeed runs on a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from deepspeed_files import zero
from ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("deepspeed") is None or find_spec("easy_vqa") is None,
        reason="DeepSpeed or easy-vqa is missing: scripts/setup.sh --transformers installs them",
    ),
]
PROGRAM = Path(__file__).parents[1] / "support" / "trainer_with_deepspeed.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and with what trainings on it have left: with ZeRO-2 and alone."""
    folder = tmp_path_factory.mktemp("deepspeed")
    zero(folder, 2)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env={
            **os.environ, **rank, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def adapter_in(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", ["mores", "mixlora"])
def test_a_training_with_zero_2_is_the_one_without(runs: Path, mode: str) -> None:
    alone, with_zero = runs / f"{mode}-alone", runs / mode
    assert len(set(losses(with_zero))) == 6
    assert losses(with_zero) == pytest.approx(losses(alone), rel=1e-5)
    first, second = adapter_in(alone), adapter_in(with_zero)
    assert first.keys() == second.keys()
    for name, value in first.items():
        # Adam turns the rounding of a gradient that is nearly zero into more: steps are 1e-2 here.
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_resumed_training_ends_bit_equal(runs: Path) -> None:
    assert losses(runs / "mores-resumed") == losses(runs / "mores")
    first, second, before = (adapter_in(runs / each) for each in ("mores", "mores-resumed", "mores/checkpoint-3"))
    assert all((value == second[name]).all() for name, value in first.items())
    assert any((value != before[name]).any() for name, value in first.items())


def test_accelerates_config_may_ask_for_it_in_the_place_of_the_arguments(runs: Path) -> None:
    assert losses(runs / "mores-by-accelerate") == losses(runs / "mores")
    assert any(path.name.startswith("global_step") for path in (runs / "mores-by-accelerate/checkpoint-6").iterdir())


def test_a_checkpoint_is_an_adapter_and_the_states_of_what_is_trained(runs: Path) -> None:
    checkpoint = runs / "mores" / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "README.md", "processor_config.json"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    whole = sum(path.stat().st_size for path in (runs / "base").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in checkpoint.rglob("*.pt")) < whole / 2
