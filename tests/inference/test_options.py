"""--device: what it chooses, and that it does so before anything can have started CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import subprocess_environment

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.options import check_bits, choose_device

PROGRAMS = """
import sys
from typer.testing import CliRunner
from llava_steering_plugin.cli import app
from llava_steering_plugin.inference import options
from llava_steering_plugin.serving import worker

class Chosen(Exception): ...

def stop(asked):
    raise Chosen(asked)

options.choose_device = stop
files = ["--question-file", "q.jsonl", "--image-folder", ".", "--answers-file", "a.jsonl"]
for program, words in (
    (app, ["chat", "base"]),
    (app, ["eval", "base", *files]),
    (worker.app, ["--model-path", "base"]),
):
    result = CliRunner().invoke(program, [*words, "--device", "cpu"])
    assert isinstance(result.exception, Chosen), (words, result.exception, result.output)
started = {"llava.model", "deepspeed", "bitsandbytes", "accelerate"} & sys.modules.keys()
assert not started, started
"""


@pytest.mark.parametrize(("gpus", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(gpus: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    assert choose_device("auto") == chosen


@pytest.mark.parametrize("asked", ["cpu", "cpu:0"])
def test_the_processor_is_chosen_by_hiding_the_gpus_where_the_vision_tower_would_land(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert choose_device(asked) == asked
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gpu_stays_visible_and_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("cuda:1") == "cuda:1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    with pytest.raises(ArgumentsError, match=r"--device cuda:2: torch finds 2 GPU\(s\), cuda:0 to cuda:1"):
        choose_device("cuda:2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArgumentsError, match="--device cuda: torch finds no GPU"):
        choose_device("cuda")
    with pytest.raises(ArgumentsError, match="--device nonsense: torch knows no such device"):
        choose_device("nonsense")
    with pytest.raises(ArgumentsError, match="--device meta keeps no numbers"):
        choose_device("meta")
    with pytest.raises(ArgumentsError, match="--device xla: torch knows no such device here"):
        choose_device("xla")


@pytest.mark.parametrize(("gpus", "device"), [(False, "auto"), (False, "cuda"), (True, "cpu")])
def test_packed_weights_are_refused_without_a_gpu_before_anything_is_loaded(
    gpus: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    check_bits(False, False, device)
    with pytest.raises(ArgumentsError, match="--load-4bit needs a GPU"):
        check_bits(True, False, device)
    with pytest.raises(ArgumentsError, match="--load-8bit needs a GPU"):
        check_bits(False, True, device)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_bits(False, True, "auto")


def test_every_program_chooses_its_device_before_it_imports_what_may_start_cuda(patched_llava: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS],
        env=subprocess_environment(patched_llava),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
