"""A training that resumes between two epochs' steps goes on at the right batch, and ends bit-equal.

Covers `training/saving/resume_position.py` through LLaVA's own train(), from every checkpoint of a run, and
`training/data/record.py`.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from deepspeed_files import zero
from rank_runs import assert_equal, resumed_from
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.training.saving.resume_position import Course

# 24 samples: six batches of four, of which every step takes four.
UNEVEN: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_tokens": "all",
    "mores_dropout": 0.1,
    "bf16": False,
    "freeze_mm_mlp_adapter": True,
    "max_steps": None,
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}
MIXLORA = {
    "tuning_mode": "mixlora",
    "mores_tokens": None,
    "mores_dropout": None,
    "mixlora_factors": 4,
    "mixlora_rank": 2,
    "mixlora_targets": "q_proj",
    "mixlora_dropout": 0.1,
}
CASES: dict[str, dict[str, object]] = {
    "of the issue": {},
    "mixlora": MIXLORA,
    "any order": {"group_by_modality_length": False},
    "fractional epochs": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 5,
        "num_train_epochs": 2.5,
    },
    "max steps": {"max_steps": 5, "num_train_epochs": None},
    "last batch dropped": {
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 3,
        "dataloader_drop_last": True,
        "num_train_epochs": 4,
    },
    "saved at the ends of epochs": {"save_strategy": "epoch", "num_train_epochs": 6},
    "more accumulated than an epoch has": {"gradient_accumulation_steps": 8},
    "data loaded by workers": {"dataloader_num_workers": 1},
}


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> list[tuple[int, float, float]]:
    """Returns step, epoch and loss of every step."""
    history = train_in_process(train_flags(tiny, output, {**UNEVEN, **overrides}))
    return [(entry["step"], entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]


def started_from(checkpoint: Path, output: Path) -> Path:
    shutil.copytree(checkpoint, output / checkpoint.name)
    torch.manual_seed(1234)
    return output


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_at_any_checkpoint_trains_and_ends_as_the_whole_one(
    tiny: TinyLlava, tmp_path: Path, case: str
) -> None:
    whole = train(tiny, tmp_path / "whole", CASES[case])
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        again = started_from(checkpoint, tmp_path / f"from-{checkpoint.name}")
        assert train(tiny, again, CASES[case]) == whole
        assert_equal(tmp_path / "whole", again)
        kept = {path.name for path in checkpoints if int(path.name[11:]) >= int(checkpoint.name[11:])}
        assert {path.name for path in again.glob("*checkpoint-*")} == kept
        last = checkpoints[-1].name
        states = [json.loads((run / last / "trainer_state.json").read_text()) for run in (tmp_path / "whole", again)]
        for state in states:
            del state["total_flos"]  # counts what was computed, also twice
        assert states[0] == states[1]


def test_the_second_step_of_the_issue_is_at_a_third_of_the_second_epoch(tiny: TinyLlava, tmp_path: Path) -> None:
    epochs = [epoch for _, epoch, _ in train(tiny, tmp_path / "whole", {})]
    assert epochs == [0.67, 1.33, 2.0]


@pytest.mark.slow
def test_several_ranks_resume_bit_equal_from_every_step_under_ddp_and_zero(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    # Twelve batches of one sample a rank, five a step; and four more than the eight of an epoch.
    small = {**UNEVEN, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 5, "num_train_epochs": 2}
    few = {**small, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 10}
    zero_2 = {**small, "use_cpu": None, "deepspeed": zero(tmp_path, 2)}
    trainings = {"ddp": small, "ddp-few": few, "ddp-epochs": {**small, "save_strategy": "epoch"}, "zero": zero_2}
    steps = {"ddp": [1, 2, 3], "ddp-few": [1], "ddp-epochs": [2], "zero": [1, 2, 3]}
    for kind in ("ddp", "zero"):
        runs = []
        for name in [each for each in trainings if each.startswith(kind)]:
            runs.append(train_flags(tiny, tmp_path / name, trainings[name]))
            for step in steps[name]:
                again = resumed_from(tmp_path / name, step, tmp_path / f"{name}-from-{step}")
                runs.append(train_flags(tiny, again, trainings[name]))
        ranks.run_on_ranks(runs, patched_llava, tmp_path, timeout=600)
    for name in trainings:
        for step in steps[name]:
            assert_equal(tmp_path / name, tmp_path / f"{name}-from-{step}")


@pytest.mark.parametrize(("batches", "accumulation"), list(itertools.product(range(1, 9), range(1, 9))))
def test_the_end_of_every_step_is_where_a_loop_over_batches_comes_to_it(batches: int, accumulation: int) -> None:
    course = Course(batches, min(accumulation, batches))
    done = 0
    for epoch, batch in itertools.product(range(5), range(1, batches + 1)):
        done += 1
        if done % course.accumulation == 0:
            step = done // course.accumulation
            assert course.after(step) == (epoch, batch)
            assert course.epoch(step) == epoch + batch / batches
    args = SimpleNamespace(max_steps=-1, num_train_epochs=2.5)
    assert course.length(args)[0] <= done // course.accumulation
    assert course.length(SimpleNamespace(max_steps=7, num_train_epochs=1))[0] == 7


@pytest.fixture(scope="module")
def stopped(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after the first step, of all but the last two samples."""
    folder = tmp_path_factory.mktemp("stopped")
    train(tiny, folder / "run", {"data_path": samples(tiny, folder, 22)})
    return folder / "run" / "checkpoint-1"


def samples(tiny: TinyLlava, folder: Path, number: int, edited: bool = False) -> Path:
    entries = json.loads(tiny.data.read_text())[:number]
    if edited:
        entries[0]["conversations"][1]["value"] = "It is something else."
    path = folder / f"{number}{edited}.json"
    path.write_text(json.dumps(entries, indent=2))
    return path


@pytest.mark.parametrize(
    ("number", "edited", "flags", "said"),
    [
        pytest.param(24, False, {}, ["it had 22 samples and has 24"], id="grown"),
        pytest.param(17, False, {}, ["it had 22 samples and has 17"], id="shrunk"),
        pytest.param(22, True, {}, ["22 samples as before, and not the same ones"], id="edited"),
        pytest.param(
            22,
            False,
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            ["--gradient_accumulation_steps is 2 and was 4", "--per_device_train_batch_size is 2 and was 4"],
            id="other batches",
        ),
        pytest.param(22, False, {}, [], id="the same"),
    ],
)
def test_what_has_changed_since_the_checkpoint_is_one_warning(
    tiny: TinyLlava,
    stopped: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: int,
    edited: bool,
    flags: Mapping[str, object],
    said: list[str],
) -> None:
    run = started_from(stopped, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        history = train(tiny, run, {"data_path": samples(tiny, tmp_path, number, edited), **flags})
    warnings = [each.getMessage() for each in caplog.records if "have changed since" in each.getMessage()]
    assert len(warnings) == bool(said)
    for part in said:
        assert part in warnings[0]
    assert [step for step, _, _ in history] == list(range(1, len(history) + 1))


def test_a_checkpoint_of_an_earlier_version_tells_a_change_by_its_epoch(
    tiny: TinyLlava, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = started_from(stopped, tmp_path / "run")
    (run / stopped.name / "steering_state.json").unlink()
    shutil.copytree(run, tmp_path / "same")
    with caplog.at_level(logging.WARNING):
        train(tiny, tmp_path / "same", {"data_path": samples(tiny, tmp_path, 22)})
        assert "have changed since" not in caplog.text
        train(tiny, run, {"data_path": samples(tiny, tmp_path, 17)})
    assert "step 1 was at epoch 0.67, and would be at 0.80 now" in caplog.text
