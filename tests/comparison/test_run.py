"""A comparison runs every cell to its end, once, whatever happens to it; a cell that fails stops no other.

Also of `cli/compare.py`, `comparison/training.py`, `comparison/evaluation.py`, `comparison/schedule.py` and
`comparison/provenance.py`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import LORA, MORES, content, write_file
from disks import file_system
from safetensors.torch import load_file
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED, TEST, VALIDATION, Record, read_records

# Of the tiny world: a full tuning learns it in a second or two, the others learn little.
FULL: dict[str, Any] = {"max_steps": 20, "per_device_train_batch_size": 8, "freeze_mm_mlp_adapter": False}
THREE: dict[str, Any] = {
    "untouched": {"frozen": True},
    "MoReS": {**MORES, "save_strategy": "steps", "save_steps": 2},
    "LoRA": LORA,
    "full": FULL,
}


class Comparison:
    """`llava-steering compare` in a process of its own."""

    def __init__(self, file: Path, llava: Path, *flags: str):
        words = [sys.executable, "-m", "llava_steering_plugin", "compare", str(file), *flags]
        self.said = file.with_name("said.txt")
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                words, env=subprocess_environment(llava), cwd=file.parent, stdout=said, stderr=said
            )

    def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(900)


def trained(output: Path) -> int:
    return len(list(output.glob("cells/*/trained.json")))


def half_trained(output: Path) -> bool:
    """Whether a cell has a checkpoint and goes on."""
    return any(
        any(cell.glob("model/checkpoint-*")) and not (cell / "trained.json").exists() for cell in output.glob("cells/*")
    )


def lasting(record: Record) -> Record:
    """A record without the times of its run."""
    return replace(
        record, step_seconds=0, step_ratio=0, answer_seconds=0, answer_ratio=0, peak_bytes=0, started="", ended=""
    )


def texts(record: Record, output: Path) -> Mapping[str, list[str]]:
    return {
        name: [json.loads(line)["text"] for line in (output / score.answers).read_text().splitlines()]
        for name, score in record.scores.items()
    }


@pytest.mark.slow
def test_a_comparison_that_was_killed_and_interrupted_ends_with_the_results_of_an_unbroken_one(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    data = content(tiny, tmp_path, methods=THREE, processes=2)
    unbroken = write_file(tmp_path, {**data, "output": str(whole)})
    assert Comparison(unbroken, patched_llava).end() == 0, (tmp_path / "said.txt").read_text()

    file = write_file(tmp_path, {**data, "output": str(broken)})
    first = Comparison(file, patched_llava)
    first.until(lambda: (trained(broken) >= 2 and half_trained(broken)) or trained(broken) >= 8)
    first.process.kill()
    first.end()
    already = trained(broken)
    assert 2 <= already < 12

    second = Comparison(file, patched_llava)
    second.until(lambda: trained(broken) > already)
    second.process.send_signal(signal.SIGINT)
    assert second.end() == 130
    assert "The same command goes on" in second.said.read_text()
    assert trained(broken) < 12

    third = Comparison(file, patched_llava)
    assert third.end() == 0, third.said.read_text()
    assert "evaluations had ended before" in third.said.read_text()

    expected, found = (read_records(output / "results.jsonl") for output in (whole, broken))
    assert list(map(lasting, found)) == list(map(lasting, expected))
    assert [texts(record, broken) for record in found] == [texts(record, whole) for record in expected]
    for record in expected:
        if record.method == "MoReS":
            weights = Path(record.adapter) / "adapter_model.safetensors"
            of_whole, of_broken = (load_file(output / weights) for output in (whole, broken))
            assert of_whole.keys() == of_broken.keys()
            assert all(torch.equal(of_broken[name], tensor) for name, tensor in of_whole.items())
    check_records(expected, whole)
    for name in ("results.md", "results.csv", "results.png"):
        assert (broken / name).stat().st_size > 500 and str(broken / name) in third.said.read_text()

    again = Comparison(file, patched_llava)
    assert again.end() == 0
    assert "done: " not in again.said.read_text(), "nothing is run twice"
    assert read_records(broken / "results.jsonl") == found


def check_records(records: list[Record], output: Path) -> None:
    """What results.jsonl says of 3 methods, 2 learning rates and 2 seeds, and of the base."""
    validated = [record for record in records if record.split == VALIDATION]
    tested = [record for record in records if record.split == TEST]
    assert len(validated) == 1 + 3 * 2 * 2 and len(tested) == 1 + 3 * 2
    assert {record.status for record in records} == {DONE}
    for method in ("MoReS", "LoRA", "full"):
        own = [record for record in validated if record.method == method]
        means = {
            rate: sum(record.scores["seen"].score for record in own if record.learning_rate == rate)
            for rate in (0.001, 0.01)
        }
        (chosen,) = {record.learning_rate for record in tested if record.method == method}
        assert means[chosen] == max(means.values())
    base, mores, lora, full = (
        next(record for record in tested if record.method == name) for name in ("untouched", "MoReS", "LoRA", "full")
    )
    assert (base.adapter, base.trained_parameters, base.file_bytes) == ("", 0, 0)
    assert (mores.trained_parameters, mores.projector_parameters) == (4 * (2 * 64 + 1), 0)
    assert lora.trained_parameters == 4 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert full.projector_parameters == 2 * (64 * 64 + 64)
    assert 0 < mores.file_bytes < lora.file_bytes < full.file_bytes
    assert full.scores["unseen"].score > 20 > base.scores["unseen"].score, "what learns is told from what does not"
    for record in (mores, lora, full):
        assert len(record.train_losses) == (20 if record is full else 4)
        assert record.step_seconds > 0 and record.step_ratio > 0  # above 1 on a quiet machine
        assert record.peak_bytes > 50e6 and record.answer_seconds > 0
        assert (output / record.adapter).is_dir()
        score = record.scores["unseen"]
        points = [json.loads(line)["score"] for line in (output / score.per_question).read_text().splitlines()]
        assert len(points) == score.questions and abs(100 * sum(points) / len(points) - score.score) < 1e-9
    assert records[0].versions.keys() >= {"llava-steering-plugin", "torch", "transformers"}


@pytest.mark.slow
def test_a_rate_that_diverges_and_a_cell_that_fails_stop_no_other(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    methods = {"MoReS": {**MORES, "learning_rates": [0.001, 1e30]}, "broken": {**LORA, "lora_bias": "purple"}}
    data = content(tiny, tmp_path, methods=methods, seeds=[1], processes=2)
    comparison = Comparison(write_file(tmp_path, data), patched_llava)
    assert comparison.end() == 1
    said, records = comparison.said.read_text(), read_records(tmp_path / "output" / "results.jsonl")
    of = {(record.method, record.learning_rate, record.split): record for record in records}
    assert of["MoReS", 1e30, VALIDATION].status == DIVERGED
    assert "no finite number from step" in (of["MoReS", 1e30, VALIDATION].error or "")
    assert None in [loss for _, loss in of["MoReS", 1e30, VALIDATION].train_losses]
    assert of["MoReS", 0.001, TEST].status == DONE and ("MoReS", 1e30, TEST) not in of
    for rate in (0.001, 0.01):
        failed = of["broken", rate, VALIDATION]
        assert failed.status == FAILED and "purple" in (failed.error or "")
        log = Path((failed.error or "").rpartition("The whole log: ")[2])
        assert "purple" in log.read_text() and str(log) in said
    assert "shapes, MoReS: learning rate 0.001 is chosen (0.001: 0.00, 1e+30: -)" in said
    assert "shapes, broken: no learning rate was chosen, so it was not tested: 2 of its cells failed" in said


@pytest.mark.slow
def test_a_full_disk_ends_the_comparison_with_one_message(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> None:
    data = content(tiny, tmp_path, methods={"full": {}}, seeds=[1], learning_rates=[0.001])
    with file_system(tmp_path / "small", "300k") as small:
        file = write_file(tmp_path, {**data, "output": str(small / "output")})
        comparison = Comparison(file, patched_llava)
        assert comparison.end() == 1
        said = comparison.said.read_text()
        assert f"the disk of {small / 'output'} is full, so shapes, full" in said and "the same command goes on" in said
        assert said.count("Traceback") == 0
        assert not list(small.glob("output/cells/*full*/trained.json")), "nothing half-written counts"
