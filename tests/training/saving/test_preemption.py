"""SIGTERM in the middle of a training, as a preemptible machine sends it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rank_runs import assert_equal
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.training.gradient_check import GradientCheck

FLAGS: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 2,
    "mores_tokens": "all",
    "mores_dropout": 0.1,
    "freeze_mm_mlp_adapter": True,
}


def train_with_a_signal_after(step: int, flags: list[str]) -> None:
    judge = GradientCheck.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        judge(self, args, state, control, **kwargs)
        if state.global_step == step:  # when this step has been looked at already: it is noted in the next one
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(GradientCheck, "on_step_end", interrupted):
        train_in_process(flags)


def test_after_sigterm_the_step_is_saved_and_the_same_command_ends_bit_equal_to_an_undisturbed_one(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    flags = {**FLAGS, "max_steps": 5, "save_strategy": "epoch"}
    before = signal.getsignal(signal.SIGTERM)
    for step in (1, 4):  # the second time, what is saved is the last step of all
        with pytest.raises(SystemExit) as stopped:
            train_with_a_signal_after(step, train_flags(tiny, tmp_path / "run", flags))
        assert stopped.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
        assert (tmp_path / "run" / f"checkpoint-{step + 1}").is_dir()
        assert not (tmp_path / "run" / WEIGHTS).exists(), "an unfinished training looks finished"

    train_in_process(train_flags(tiny, tmp_path / "run", flags))
    train_in_process(train_flags(tiny, tmp_path / "whole", flags))
    assert_equal(tmp_path / "whole", tmp_path / "run")


def test_a_sigterm_after_the_last_step_lets_the_training_save_its_result(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    train_with_a_signal_after(3, train_flags(tiny, tmp_path / "run", FLAGS))
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3
    assert read(tmp_path / "run").tensors
