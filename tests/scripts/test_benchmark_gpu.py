"""scripts/gpu_check.sh: without a GPU it says so, and with --tiny all of it runs on the processor."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quick_runs import SCRIPTS
from rich.console import Console
from torch import nn
from training_runs import subprocess_environment

SCRIPT = SCRIPTS / "gpu_check.sh"
VARIANTS = {"frozen", "MoReS r=1, 1%", "MoReS r=4, all", "MixLoRA E=16, r=4", "LoRA r=8", "LoRA r=128"}


@pytest.fixture
def entry(patched_llava: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the command, imported here."""
    import bitsandbytes

    from benchmarks import gpu

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)  # packing does it too, for good
    return gpu


def check(llava: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = subprocess_environment(llava, {"PYTHON": sys.executable})
    return subprocess.run([SCRIPT, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_without_a_gpu_it_is_one_clear_message(patched_llava: Path, tmp_path: Path) -> None:
    done = check(patched_llava, tmp_path)
    assert done.returncode == 2
    if torch.version.cuda is None:
        release = torch.__version__.split("+")[0]
        assert f"`export TORCH=torch=={release}; scripts/setup.sh`" in done.stderr
    else:
        assert "no CUDA device is visible" in done.stderr
    assert "--tiny" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_tiny_size_goes_through_everything_in_both_precisions(patched_llava: Path, tmp_path: Path) -> None:
    done = check(patched_llava, tmp_path, "--tiny", "--output", "figures")

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    made = json.loads((tmp_path / "figures" / "gpu_check.json").read_text())
    assert {(row["bits"], row["variant"]) for row in made["results"]} == {(b, v) for b in (16, 4) for v in VARIANTS}
    trained = {row["variant"]: row["parameters"] for row in made["results"]}
    # 2 layers of width 64: MoReS 2 d D + d each, LoRA r (in + out) of seven linears.
    assert trained["frozen"] == 0 and trained["MoReS r=1, 1%"] == 2 * (2 * 64 + 1)
    assert trained["LoRA r=8"] == 2 * 8 * (4 * (64 + 64) + 3 * (64 + 128))
    for row in made["results"]:
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["prefill"] > 0 and row["peak"] > 0
        assert 0 < row["loss"] < 20
        assert row["steps"].keys() == {"1", "16"} and all(seconds > 0 for seconds in row["steps"].values())
        assert row["layer"] > 0
        assert torch.cuda.is_available() or "no CUDA device" in row["replay"]
    for row in made["results"]:
        frozen = next(each for each in made["results"] if (each["bits"], each["variant"]) == (row["bits"], "frozen"))
        assert row["variant"] == "frozen" or row["forward"] > frozen["forward"] > 0
        assert row["variant"] == "frozen" or row["backward"] > frozen["backward"] > 0
    assert made["machine"]["versions"]["torch"]
    assert made["tests"]["status"] in (None, 0, 5)
    assert "Training steps and generation" in done.stdout


@pytest.mark.slow
def test_a_variant_that_fails_is_a_row_and_the_others_are_measured_all_the_same(
    entry: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, written, before = entry.train, tmp_path / "gpu_check.json", []

    def failing(model: Any, parameters: list[nn.Parameter], size: Any) -> Any:
        before.append(len(json.loads(written.read_text())["results"]) if written.exists() else 0)
        if len(before) in (2, 7):  # in the middle of a step: MoReS over 16 bits, the frozen model in 4 bits
            model.register_forward_hook(lambda *_: pytest.fail("the next variant runs on what the failed one left"))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return train(model, parameters, size)

    monkeypatch.setattr(entry, "train", failing)
    monkeypatch.setattr(entry, "run_tests", lambda console: {"status": 0, "summary": "3 passed, 18 skipped"})
    status = entry.run(tiny=True, output=tmp_path, tests=True)

    assert status == 1
    assert before == list(range(12)), "each is written as soon as it is there"
    made = json.loads(written.read_text())
    errors = {(row["bits"], row["variant"]): row["error"] for row in made["results"] if "error" in row}
    assert errors.keys() == {(16, "MoReS r=1, 1%"), (4, "frozen")}
    assert all("CUDA out of memory" in error for error in errors.values())
    assert all(row["seconds"] > 0 for row in made["results"] if "error" not in row)
    assert made["tests"]["status"] == 0
    told = capsys.readouterr().out
    assert "failed, and not in the table: 16 bits, MoReS r=1, 1%; 4 bits, frozen" in told
    assert "tests that need CUDA: 3 passed, 18 skipped" in told


def test_the_tests_that_need_cuda_see_the_first_visible_card_only(
    entry: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.CompletedProcess(command, 0, "3 passed, 18 skipped in 2.00s\n", "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    for visible in ("5,7", None):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert "18 skipped" in entry.run_tests(Console())["summary"]
    assert seen == ["5", "0"]


def test_packing_draws_nothing_and_keeps_no_weight_longer_than_its_turn(
    entry: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    from benchmarks.shared import random_llava

    device = torch.device("cpu")
    model = random_llava.build(entry.TINY, device, 16)
    linears = [weakref.ref(part) for part in model.get_model().layers.modules() if isinstance(part, nn.Linear)]
    alive: list[int] = []

    class Counted(bitsandbytes.nn.Linear4bit):
        def __init__(self, *args: Any, **kwargs: Any):
            alive.append(sum(linear() is not None for linear in linears))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", Counted)
    drawn = torch.get_rng_state()
    random_llava.pack(model, device)
    assert torch.equal(torch.get_rng_state(), drawn)
    count = len(linears)
    assert alive == [*range(count, 0, -1), 0], "the last one is the head"
