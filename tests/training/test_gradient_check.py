"""When a training that cannot learn is stopped, and when one that only waits for images is not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_runs import losses
from tiny_llava import TinyLlava
from torch import Tensor, nn
from training_runs import train_flags, train_in_process

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mores import Steering
from llava_steering_plugin.training.gradient_check import LONG, STEPS, GradientCheck

# All that the check asks a trainer for.
TRAINING = SimpleNamespace(device=torch.device("cpu"), process_index=0)
SHORT: dict[str, object] = {"tuning_mode": "mores", "mores_tokens": "all", "bf16": False, "max_steps": STEPS + 1}


class Part(nn.Module):
    """A module of a mode, with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor, factor: float = 1.0) -> Tensor:
        return (factor * tokens @ self.weight).sum()


TOKENS, NONE = torch.ones(2, 3), torch.ones(0, 3)
Modules = dict[str, nn.Module]


@pytest.fixture
def parts() -> Modules:
    return {name: Part() for name in ("layers.0", "layers.1", "layers.2")}


def check_of(parts: Modules) -> GradientCheck:
    parameters = {f"{path}.{name}": each for path, part in parts.items() for name, each in part.named_parameters()}
    return GradientCheck(parameters, parts, "layers.2")


def train(
    parts: Modules, loss: Callable[[int], Tensor], steps: int, skipped: Callable[[int], bool] | None = None
) -> GradientCheck:
    """Steps of a real backward pass each, with the check called behind each as the trainer calls it."""
    check = check_of(parts)
    for step in range(1, steps + 1):
        loss(step).backward()
        for part in parts.values():
            part.zero_grad()  # as under DeepSpeed, which keeps gradients elsewhere
        optimizer = SimpleNamespace(step_was_skipped=skipped is not None and skipped(step))
        check.on_step_end(TRAINING, None, None, optimizer=optimizer)
    return check


def test_a_parameter_that_no_gradient_reaches_stops_the_training_after_its_first_step(parts: Modules) -> None:
    used, _, last = parts.values()
    with pytest.raises(SteeringError, match=r"after 1 step\(s\), 1 of the adapter's 3 parameters") as error:
        train(parts, lambda step: used(TOKENS) + last(TOKENS), 1)
    assert "layers.1.weight: no gradient arrived" in str(error.value)
    assert "layers.0" not in str(error.value)


def test_zeros_stop_it_only_after_the_last_step_of_the_check_and_never_in_the_last_layer(parts: Modules) -> None:
    used, other, last = parts.values()

    def idle(step: int) -> Tensor:
        return used(TOKENS) + other(TOKENS, 0) + last(TOKENS, 0)

    train(parts, idle, STEPS - 1)
    with pytest.raises(SteeringError, match=rf"after {STEPS} step\(s\), 1 of") as error:
        train(parts, idle, STEPS)
    assert "layers.1.weight: all gradients were zero" in str(error.value)


def test_one_step_with_a_gradient_is_enough_and_then_nothing_is_watched_any_more(parts: Modules) -> None:
    used, other, last = parts.values()
    check = train(parts, lambda step: used(TOKENS) + other(TOKENS, step == 7) + last(TOKENS, 0), STEPS + 3)
    assert check.steps == STEPS
    assert not check.handles
    assert not any(part.weight._backward_hooks or part._forward_hooks for part in parts.values())


def test_only_steps_count_in_which_the_module_gets_tokens(parts: Modules) -> None:
    used, other, last = parts.values()

    def rarely(factor: float) -> Callable[[int], Tensor]:
        return lambda step: used(TOKENS) + other(TOKENS if step % 7 == 0 else NONE, factor) + last(TOKENS, 0)

    # Zeros in nine steps that count are not enough, and those in the other 60 are nothing.
    assert train(parts, rarely(0), 69).handles
    with pytest.raises(SteeringError, match=r"after 70 step\(s\), 1 of") as error:
        train(parts, rarely(0), 70)
    assert "layers.1.weight: all gradients were zero" in str(error.value)
    assert not train(parts, rarely(1), 70).handles


def test_steps_that_a_loss_scaler_skips_do_not_count_and_gradients_that_overflow_are_none(parts: Modules) -> None:
    used, other, last = parts.values()

    def overflown(step: int) -> Tensor:
        return used(TOKENS) + other(TOKENS, float("inf") if step < 30 else 1.0) + last(TOKENS)

    assert not train(parts, overflown, 30, skipped=lambda step: step < 30).handles
    with pytest.raises(SteeringError, match=r"layers.1.weight: all gradients were zero"):
        train(parts, overflown, 30)


def test_passes_without_gradients_and_in_evaluation_are_no_calls(parts: Modules) -> None:
    used, other, last = parts.values()

    def validated(step: int) -> Tensor:
        with torch.no_grad():
            other(TOKENS)
        other.eval()
        other(TOKENS)
        other.train()
        return used(TOKENS) + other(NONE) + last(TOKENS)

    train(parts, validated, 3 * STEPS)


def test_a_parameter_in_a_list_that_is_never_called_is_judged_by_the_module_around_it() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.ones(3))])

        def forward(self, tokens: Tensor) -> Tensor:
            return (0 * tokens @ self.weights[0]).sum()

    holder = Holder()
    train({"layers.0": holder}, lambda step: holder(NONE), 2 * STEPS)
    with pytest.raises(SteeringError, match=r"layers\.0\.weights\.0: all gradients were zero"):
        train({"layers.0": holder}, lambda step: holder(TOKENS), STEPS)


def test_a_resumed_training_is_not_judged_again(parts: Modules) -> None:
    check = check_of(parts)
    check.on_train_begin(TRAINING, SimpleNamespace(global_step=0), None)
    assert check.handles
    check.on_train_begin(TRAINING, SimpleNamespace(global_step=1), None)
    assert not check.handles
    check.on_step_end(TRAINING, None, None)
    check.on_train_end(TRAINING, None, None)


def test_a_long_time_without_tokens_is_one_warning(parts: Modules, caplog: pytest.LogCaptureFixture) -> None:
    used, other, last = parts.values()
    with caplog.at_level(logging.WARNING):
        train(parts, lambda step: used(TOKENS) + other(NONE) + last(NONE), LONG - 1)
        assert not caplog.records
        check = train(parts, lambda step: used(TOKENS) + other(NONE) + last(NONE), 2 * LONG)
        check.on_train_end(TRAINING, None, None)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"no image in {LONG} step(s)" in warning
    assert "2 of the adapter's 3 parameters have not been trained on anything" in warning
    assert "layers.1.weight" in warning and "layers.0" not in warning
    assert not check.handles


def test_of_many_the_first_ten_are_named_and_the_rest_are_counted() -> None:
    used = Part()
    with pytest.raises(SteeringError) as error:
        train({"layers.0": used, **{f"layers.{n}": Part() for n in range(3, 15)}}, lambda step: used(TOKENS), 1)
    assert str(error.value).count("no gradient arrived") == 10
    assert "... and 2 more" in str(error.value)


@pytest.fixture(scope="module")
def few_images(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples, four with an image."""
    samples = json.loads(tiny.data.read_text())
    images = [sample for sample in samples if "image" in sample][:4]
    texts = [sample for sample in samples if "image" not in sample]
    path = tmp_path_factory.mktemp("few") / "few.json"
    path.write_text(json.dumps(images + [{**texts[n % len(texts)], "id": f"text-{n}"} for n in range(36)]))
    return path


@pytest.mark.parametrize("seed", range(8))
def test_a_tenth_of_samples_with_an_image_is_enough_at_every_seed(
    tiny: TinyLlava, few_images: Path, tmp_path: Path, seed: int
) -> None:
    flags = {**SHORT, "data_path": few_images, "per_device_train_batch_size": 1, "seed": seed, "max_steps": 15}
    train_in_process(train_flags(tiny, tmp_path / "run", flags))
    assert len(losses(tmp_path / "run")) == 15


def test_a_training_without_any_image_is_told_so_and_ends(
    tiny: TinyLlava, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([sample for sample in json.loads(tiny.data.read_text()) if "image" not in sample]))
    flags = {**SHORT, "data_path": data, "group_by_modality_length": False}
    with caplog.at_level(logging.WARNING):
        train_in_process(train_flags(tiny, tmp_path / "run", flags))
    warnings = [record.getMessage() for record in caplog.records if "trained on anything" in record.getMessage()]
    assert len(warnings) == 1
    assert f"no image in {STEPS + 1} step(s)" in warnings[0]
    assert "layers.0.vis.steer_shift" in warnings[0]


def scaled_to_nothing(self: Steering, hidden: Tensor, this_pass: ForwardPass) -> Tensor:
    return (nn.functional.linear(hidden, self.steer_shift, self.steer_offset) @ (0 * self.basis())).to(hidden.dtype)


def cut_off(self: Steering, hidden: Tensor, this_pass: ForwardPass) -> Tensor:
    shifted = nn.functional.linear(hidden, self.steer_shift, self.steer_offset)
    return (shifted @ self.basis().detach()).to(hidden.dtype)


@pytest.mark.parametrize(
    ("broken", "sparse", "reason"),
    [
        pytest.param(cut_off, True, "layers.0.vis.steer_basis: no gradient arrived", id="no gradient arrives"),
        pytest.param(scaled_to_nothing, False, "layers.0.vis.steer_shift: all gradients were zero", id="only zeros"),
    ],
)
def test_parameters_that_are_truly_disconnected_stop_a_training(
    tiny: TinyLlava,
    few_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: Any,
    sparse: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(Steering, "forward", broken)
    flags = {**SHORT, "data_path": few_images if sparse else tiny.data, "max_steps": 40}
    with pytest.raises(SystemExit) as ended:
        train_in_process(train_flags(tiny, tmp_path / "run", flags))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert not sparse or "after 1 step(s)" in error
