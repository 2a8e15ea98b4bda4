"""Validation while training: it computes the right loss, the training does not notice it, and the best one is kept.

Covers `training/validation.py`, `training/beside.py` and `training/saving/best_checkpoint.py`.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_runs import assert_equal, losses
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.training.beside import random_states_kept
from llava_steering_plugin.training.saving import integrity
from llava_steering_plugin.training.saving.best_checkpoint import without_nan

SAMPLES = 7
MORES: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 2,
    "mores_tokens": "all",
    "mores_dropout": 0.1,
    "bf16": False,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}
MIXLORA: dict[str, object] = {
    "tuning_mode": "mixlora",
    "mixlora_dropout": 0.1,
    "mixlora_noise": 0.1,
    "max_steps": 3,
}
# So high a rate that the loss of the held-out samples rises again.
STRAYING: dict[str, object] = {"learning_rate": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 2}


@pytest.fixture(scope="module")
def held_out(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples, one of them without an image: batches of three, three and one."""
    samples = json.loads(tiny.data.read_text())
    file = tmp_path_factory.mktemp("held-out") / "held-out.json"
    file.write_text(json.dumps(samples[:6] + samples[10:11]))
    return file


@pytest.fixture(scope="module")
def validating(held_out: Path) -> dict[str, object]:
    return {
        "eval_data_path": held_out,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 3,
    }


@pytest.fixture(scope="module")
def best(
    tiny: TinyLlava, patched_llava: Path, validating: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training whose first checkpoint is its best one; read-only."""
    output = tmp_path_factory.mktemp("best") / "run"
    wanted = {**MORES, **STRAYING, **validating, "load_best_model_at_end": True}
    train_in_process(train_flags(tiny, output, wanted))
    assert min(evaluations(output).items(), key=lambda pair: pair[1])[0] == 1
    return output


def train(tiny: TinyLlava, output: Path, *flags: Mapping[str, object]) -> Path:
    merged: dict[str, object] = {}
    for each in flags:
        merged |= each
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, output, merged))
    return output


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / integrity.STATE).read_text()))


def evaluations(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in state_of(run)["log_history"] if "eval_loss" in entry}


def same_tensors(one: Path, other: Path) -> bool:
    first, second = read(one).tensors, read(other).tensors
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize("mode", [MORES, MIXLORA], ids=["mores", "mixlora"])
def test_a_training_ends_bit_equal_with_and_without_validation(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, validating: dict[str, object], mode: dict[str, object]
) -> None:
    plain = train(tiny, tmp_path / "plain", mode)
    validated = train(tiny, tmp_path / "validated", mode, validating)
    assert_equal(plain, validated)
    assert losses(plain) == losses(validated)
    figures = [
        {name: value for name, value in entry.items() if name.startswith("mixlora")}
        for run in (plain, validated)
        for entry in state_of(run)["log_history"]
        if "loss" in entry
    ]
    assert figures[: len(figures) // 2] == figures[len(figures) // 2 :]
    assert len(evaluations(validated)) == mode["max_steps"]


def test_the_loss_is_the_mean_of_what_training_would_report_for_each_sample_alone(
    tiny: TinyLlava, best: Path, held_out: Path
) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.train.train import DataArguments, DataCollatorForSupervisedDataset, LazySupervisedDataset

    path = str(best / "checkpoint-1")
    tokenizer, model, processor, _ = load_pretrained_model(path, None, get_model_name_from_path(path), device="cpu")
    model.float()  # the vision tower stays as upstream's training has it
    model.get_vision_tower().half()
    tokenizer.pad_token = tokenizer.unk_token
    data = DataArguments(str(held_out), is_multimodal=True, image_folder=str(tiny.images), image_aspect_ratio="pad")
    data.image_processor, data.mm_use_im_start_end = processor, False
    samples = LazySupervisedDataset(str(held_out), tokenizer, data)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    assert len(samples) == SAMPLES
    with torch.no_grad():
        alone = [float(model(**collate([samples[number]])).loss) for number in range(SAMPLES)]
    assert evaluations(best)[1] == pytest.approx(sum(alone) / SAMPLES, rel=2e-3)


def test_batches_do_not_change_the_loss(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, validating: dict[str, object], best: Path
) -> None:
    once = {**validating, "per_device_eval_batch_size": 1, "dataloader_drop_last": True}
    run = train(tiny, tmp_path / "one-by-one", MORES, STRAYING, once)
    assert evaluations(run) == pytest.approx(evaluations(best), rel=1e-6)


def test_the_result_is_the_best_checkpoint_which_no_limit_deletes(
    tiny: TinyLlava, tmp_path: Path, validating: dict[str, object], best: Path
) -> None:
    assert same_tensors(best, best / "checkpoint-1") and not same_tensors(best, best / "checkpoint-2")
    wanted = {"load_best_model_at_end": True, "save_total_limit": 1}
    run = train(tiny, tmp_path / "run", MORES, STRAYING, validating, wanted)
    assert same_tensors(run, run / "checkpoint-1") and same_tensors(run, best)


def test_the_best_checkpoint_survives_a_resume_in_a_folder_that_was_moved(
    tiny: TinyLlava, tmp_path: Path, validating: dict[str, object], best: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(best / "checkpoint-1", moved / "checkpoint-1")
    state = state_of(moved / "checkpoint-1")
    gone = state["best_model_checkpoint"].replace(str(best), str(tmp_path / "gone"))
    (moved / "checkpoint-1" / integrity.STATE).write_text(json.dumps(state | {"best_model_checkpoint": gone}))
    train(tiny, moved, MORES, STRAYING, validating, {"load_best_model_at_end": True, "save_total_limit": 1})
    assert same_tensors(moved, best)
    assert evaluations(moved) == evaluations(best)


def test_a_training_killed_behind_its_last_checkpoint_still_ends_with_its_best_one(
    tiny: TinyLlava, tmp_path: Path, validating: dict[str, object], best: Path
) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(best / name, run / name)
    train(tiny, run, MORES, STRAYING, validating, {"load_best_model_at_end": True})
    assert same_tensors(run, best)


def test_a_best_checkpoint_that_is_gone_is_refused_at_the_resume(
    tiny: TinyLlava,
    tmp_path: Path,
    validating: dict[str, object],
    best: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(best / "checkpoint-2", run / "checkpoint-2")
    state = state_of(run / "checkpoint-2")
    state["best_model_checkpoint"] = str(tmp_path / "gone" / "checkpoint-1")
    (run / "checkpoint-2" / integrity.STATE).write_text(json.dumps(state))
    with pytest.raises(SystemExit):
        train(tiny, run, MORES, STRAYING, validating, {"load_best_model_at_end": True, "max_steps": 3})
    assert f"{tmp_path / 'gone' / 'checkpoint-1'}, is gone" in capsys.readouterr().err


def test_an_evaluation_for_which_a_sigterm_left_no_time_is_made_up_for(
    tiny: TinyLlava, tmp_path: Path, validating: dict[str, object], best: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(best / "checkpoint-1", run / "checkpoint-1")
    state = state_of(run / "checkpoint-1") | {"best_metric": None, "best_model_checkpoint": None}
    state["log_history"] = [entry for entry in state["log_history"] if "eval_loss" not in entry]
    state["eval_steps"] = 500  # as of a training that had no evaluations: transformers would keep it
    (run / "checkpoint-1" / integrity.STATE).write_text(json.dumps(state))
    train(tiny, run, MORES, STRAYING, validating, {"load_best_model_at_end": True})
    assert evaluations(run) == evaluations(best)
    assert same_tensors(run, best)
    assert state_of(run / "checkpoint-1")["best_model_checkpoint"] == str(run / "checkpoint-1")


def test_validation_at_the_end_of_epochs_and_once_at_the_end(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, validating: dict[str, object]
) -> None:
    epochs = {"evaluation_strategy": "epoch", "eval_steps": None, "max_steps": None, "num_train_epochs": 2}
    by_epoch = {**epochs, "save_strategy": "epoch", "save_steps": None, "load_best_model_at_end": True}
    run = train(tiny, tmp_path / "epochs", MORES, validating, by_epoch)
    evaluated = evaluations(run)
    assert list(evaluated) == [6, 12]
    assert same_tensors(run, run / f"checkpoint-{min(evaluated, key=lambda step: evaluated[step])}")
    once = {"evaluation_strategy": "no", "eval_steps": None, "do_eval": True}
    assert list(evaluations(train(tiny, tmp_path / "once", MORES, validating, once))) == [4]


def test_an_epoch_whose_end_comes_again_after_a_resume_is_not_evaluated_twice(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, validating: dict[str, object]
) -> None:
    # Of six batches, the first step takes four: the epoch ends between two steps. A second evaluation would be a
    # second one without progress for this scheduler.
    flags = {
        **{"evaluation_strategy": "epoch", "eval_steps": None, "max_steps": None, "num_train_epochs": 2},
        **{"save_strategy": "epoch", "save_steps": None, "gradient_accumulation_steps": 4},
        **{"lr_scheduler_type": "reduce_lr_on_plateau"},
    }
    whole = train(tiny, tmp_path / "whole", MORES, validating, flags)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    train(tiny, resumed, MORES, validating, flags)
    evaluated = [
        [entry["step"] for entry in state_of(run)["log_history"] if "eval_loss" in entry] for run in (whole, resumed)
    ]
    assert evaluated == [[1, 2], [1, 2]]
    assert_equal(whole, resumed)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"id": "odd", "conversations": []}, "`conversations` is empty"),
        ({"id": "odd", "image": "nothing.png"}, "there is no image"),
        ({"id": "odd", "image": "cut.png"}, "cut.png cannot be read"),
    ],
    ids=["entry", "missing", "truncated"],
)
def test_a_bad_sample_to_validate_on_is_refused_by_name_before_the_first_step(
    tiny: TinyLlava,
    patched_llava: Path,
    tmp_path: Path,
    validating: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    bad: dict[str, object],
    reason: str,
) -> None:
    good = json.loads(tiny.data.read_text())[0]
    images = Path(shutil.copytree(tiny.images, tmp_path / "images"))
    picture = (images / good["image"]).read_bytes()
    (images / "cut.png").write_bytes(picture[: len(picture) // 2])
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([good, {**good, **bad}]))
    with pytest.raises(SystemExit):
        train(tiny, tmp_path / "run", MORES, validating, {"eval_data_path": file, "image_folder": images})
    error = capsys.readouterr().err
    assert f"{file}:\n  - " in error and "sample 1 (id 'odd')" in error and reason in error
    assert "Traceback" not in error and not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    assert without_nan({"eval_loss": math.nan}) is None
    assert without_nan({"eval_loss": 1.0}) == {"eval_loss": 1.0}
    assert without_nan(None) is None


def test_every_random_generator_goes_on_as_if_nothing_had_been_drawn() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with random_states_kept():
        drawn()
    assert drawn() == expected
