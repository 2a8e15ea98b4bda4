"""Interference between tasks is the paper's: worked out by hand, and on tasks built to agree and to conflict.

Module: measures/interference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steered import load_llava, strengthen, words
from tiny_llava import TinyLlava
from torch import Tensor, nn

from llava_steering_plugin import attach
from llava_steering_plugin.measures.interference import EVERYTHING, Effects, Groups, Interference, gathered
from llava_steering_plugin.modes.mixlora import MixLoRA

Losses = list[list[Callable[[], Tensor]]]


def measure_interference(groups: Groups, steps: Losses, losses: Losses) -> dict[str, Effects]:
    """The effects over every group of parameters, for samples of each task to step along and to take losses of."""
    measure = Interference(groups, len(steps))
    for task, samples in enumerate(steps):
        for loss in samples:
            measure.step(task, loss)
    rows = [[measure.effect(loss) for loss in samples] for samples in losses]
    return {name: gathered([[row[name] for row in samples] for samples in rows]) for name in measure.groups}


def linear(parameter: nn.Parameter, gradient: list[list[float]]) -> Callable[[], Tensor]:
    """A loss whose gradient is given."""
    return lambda: (parameter * torch.tensor(gradient)).sum()


def test_effects_and_their_ratios_by_hand() -> None:
    a, b = nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(1, 2))

    def loss(of_a: list[list[float]], of_b: list[list[float]]) -> Callable[[], Tensor]:
        return lambda: linear(a, of_a)() + linear(b, of_b)()

    zero = [[0.0, 0.0]]
    # Task 0 steps along (1, 0) and (0, 1), so its mean unit gradient is (1/2, 1/2); task 1 along (-1, 0).
    steps = [
        [loss([[3.0], [0.0]], zero), loss([[0.0], [0.5]], zero)],
        [loss([[-2.0], [0.0]], [[3.0, 4.0]])],
    ]
    losses = [
        [loss([[2.0], [2.0]], zero), loss([[4.0], [0.0]], zero)],
        [loss([[-1.0], [1.0]], [[10.0, 0.0]])],
    ]
    found = measure_interference({"A": [a], "B": [b]}, steps, losses)
    assert list(found) == ["A", "B", EVERYTHING]

    of_a = found["A"]
    torch.testing.assert_close(of_a.by_sample[0], torch.tensor([[2.0, -2.0], [2.0, -4.0]]).double())
    torch.testing.assert_close(of_a.by_sample[1], torch.tensor([[0.0, 1.0]]).double())
    torch.testing.assert_close(of_a.mean_of_ratios(), torch.tensor([[1.0, -1.5], [0.0, 1.0]]).double())
    torch.testing.assert_close(of_a.ratio_of_means(), torch.tensor([[1.0, -1.5], [0.0, 1.0]]).double())
    # The second sample of task 0 uses the first row alone: half of task 0's steps meet it there.
    torch.testing.assert_close(of_a.meeting[0], torch.tensor([[1.0, 1.0], [0.5, 1.0]]).double())
    torch.testing.assert_close(of_a.mean_of_ratios(shared=True)[0], torch.tensor([1.0, -(1 + 4 / 4) / 2]).double())

    of_b = found["B"]  # only task 1 uses B: along (0.6, 0.8)
    torch.testing.assert_close(of_b.by_sample[1], torch.tensor([[0.0, 6.0]]).double())
    assert of_b.mean_of_ratios(shared=True)[1].isnan().tolist() == [True, False]

    whole = found[EVERYTHING]  # lengths over all parameters: task 1's unit gradient is (-2, 0, 3, 4) / sqrt(29)
    expected = (2.0 + 30.0) / 29**0.5
    assert whole.by_sample[1][0, 1].item() == pytest.approx(expected, rel=1e-6)


def test_a_mean_of_ratios_and_a_ratio_of_means_differ_where_samples_do() -> None:
    a = nn.Parameter(torch.zeros(2, 1))
    steps = [[linear(a, [[1.0], [0.0]])], [linear(a, [[0.0], [1.0]])]]
    losses = [[linear(a, [[1.0], [1.0]]), linear(a, [[0.1], [1.0]])], [linear(a, [[0.0], [1.0]])]]
    found = measure_interference({"A": [a]}, steps, losses)["A"]
    assert found.mean_of_ratios()[0, 1].item() == pytest.approx((1 + 10) / 2)
    assert found.ratio_of_means()[0, 1].item() == pytest.approx(2 / 1.1)


def test_a_step_that_does_nothing_to_its_own_task_is_nothing_to_compare_with() -> None:
    """Not even an infinite ratio: JSON has no word for it, and one such sample would hide all others."""
    nothing, something = [0.0, 3.0], [2.0, 1.0]
    one_still = Effects([torch.tensor([nothing, something])] * 2, [torch.ones(2, 2)] * 2)
    assert one_still.mean_of_ratios()[0].tolist() == [1, 0.5]
    all_still = Effects([torch.tensor([nothing])] * 2, [torch.ones(1, 2)] * 2)
    assert all_still.mean_of_ratios()[0].isnan().all()
    assert all_still.ratio_of_means().isnan().tolist() == [[True, True], [False, False]]


@pytest.fixture(scope="module")
def routed(tiny: TinyLlava, patched_llava: Any) -> tuple[Any, dict[str, list[nn.Parameter]]]:
    """A LLaVA with a strong MixLoRA, and its factors by side."""
    model = load_llava(tiny.llava)
    attachment = strengthen(attach(model, MixLoRA(factors=4, rank=2, alpha=1.0)))
    sides = {
        side: [value for name, value in attachment.parameters().items() if name.endswith(side)]
        for side in ("routed_a", "routed_b")
    }
    return model, sides


def samples(model: Any, answer: list[int], seeds: range) -> list[Callable[[], Tensor]]:
    """Questions, a different one for each seed, with one answer."""

    def sample(seed: int) -> Callable[[], Tensor]:
        question = [1, *words(6, seed)]
        ids = torch.tensor([question + answer])
        labels = torch.tensor([[-100] * len(question) + answer])
        return lambda: model(input_ids=ids, labels=labels).loss

    return [sample(seed) for seed in seeds]


def test_tasks_that_agree_help_and_tasks_that_conflict_harm(
    routed: tuple[Any, dict[str, list[nn.Parameter]]],
) -> None:
    model, sides = routed
    yes, no = [300], [400]
    # The same questions: two tasks answer yes, one answers no.
    steps = [samples(model, answer, range(16)) for answer in (yes, yes, no)]
    losses = [samples(model, answer, range(100, 116)) for answer in (yes, yes, no)]
    found = measure_interference(sides, steps, losses)
    for side in (*sides, EVERYTHING):
        matrix = found[side].ratio_of_means()
        torch.testing.assert_close(matrix.diagonal(), torch.ones(3).double())
        # The same samples: as good, up to the order in which MixLoRA's first pass sums gradients.
        assert matrix[0, 1].item() == pytest.approx(1, abs=1e-6)
        assert matrix[0, 2] < 0, side
        assert matrix[2, 0] < 0, side


def test_factors_that_nobody_shares_give_zero_and_are_left_out_of_shared(
    routed: tuple[Any, dict[str, list[nn.Parameter]]],
) -> None:
    model, sides = routed
    groups = {"one": [sides["routed_a"][0]]}
    tasks = [samples(model, [300], range(number, number + 1)) for number in range(12)]
    found = measure_interference(groups, tasks, tasks)["one"]
    meeting = torch.cat(list(found.meeting))
    effects = torch.cat(list(found.by_sample))
    assert (meeting == 0).any() and (meeting == 1).any()
    assert (effects[meeting == 0] == 0).all()
    shared = found.mean_of_ratios(shared=True)
    assert torch.equal(shared.isnan(), meeting == 0)
