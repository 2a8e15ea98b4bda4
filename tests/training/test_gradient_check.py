"""When a training that cannot learn is stopped: after the first step, after the tenth, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.training.gradient_check import STEPS, GradientCheck

# All that the check asks a trainer for.
TRAINING = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    names = ("layers.0.used", "layers.1.other", "layers.2.last")
    return {name: nn.Parameter(torch.ones(3)) for name in names}


def train(parameters: dict[str, nn.Parameter], loss: Callable[[int], Tensor], steps: int) -> GradientCheck:
    """Steps of a real backward pass each, with the check called behind each as the trainer calls it."""
    check = GradientCheck(parameters, "layers.2")
    for step in range(1, steps + 1):
        loss(step).backward()
        for parameter in parameters.values():
            parameter.grad = None  # as under DeepSpeed, which keeps gradients elsewhere
        check.on_step_end(TRAINING, None, None)
    return check


def test_a_parameter_that_no_gradient_reaches_stops_the_training_after_its_first_step(
    parameters: dict[str, nn.Parameter],
) -> None:
    used, _, last = parameters.values()
    with pytest.raises(SteeringError, match=r"after 1 step\(s\), 1 of the adapter's 3 parameters") as error:
        train(parameters, lambda step: (used + last).sum(), 1)
    assert "layers.1.other: no gradient arrived" in str(error.value)
    assert "layers.0.used" not in str(error.value)


def test_zeros_stop_it_only_after_the_last_step_of_the_check_and_never_in_the_last_layer(
    parameters: dict[str, nn.Parameter],
) -> None:
    used, other, last = parameters.values()

    def idle(step: int) -> Tensor:
        return (used + 0 * other + 0 * last).sum()

    train(parameters, idle, STEPS - 1)
    with pytest.raises(SteeringError, match=rf"after {STEPS} step\(s\), 1 of") as error:
        train(parameters, idle, STEPS)
    assert "layers.1.other: all gradients were zero" in str(error.value)


def test_one_step_with_a_gradient_is_enough_and_then_nothing_is_watched_any_more(
    parameters: dict[str, nn.Parameter],
) -> None:
    used, other, last = parameters.values()
    check = train(parameters, lambda step: (used + (step == 7) * other + 0 * last).sum(), STEPS + 3)
    assert check.steps == STEPS
    assert not check.handles
    assert not any(parameter._backward_hooks for parameter in parameters.values())


def test_of_many_the_first_ten_are_named_and_the_rest_are_counted() -> None:
    many = {f"layers.{number}.idle": nn.Parameter(torch.ones(1)) for number in range(12)}
    used = nn.Parameter(torch.ones(1))
    with pytest.raises(SteeringError) as error:
        train({"layers.0.used": used, **many}, lambda step: used.sum(), 1)
    assert str(error.value).count("no gradient arrived") == 10
    assert "... and 2 more" in str(error.value)
