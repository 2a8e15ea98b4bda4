"""The routing problem: rows that are routed at once and balanced as passes have the gradients of real passes."""

from __future__ import annotations

import pytest
import torch
from routed import everything

from llava_steering_plugin.modes.mixlora import RoutedLinear
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps


@pytest.mark.parametrize("over_step", [True, False], ids=["over the step", "pass by pass"])
@pytest.mark.parametrize("rows", [32, 8, 1])
def test_one_pass_that_stands_for_many_has_their_gradients(rows: int, over_step: bool) -> None:
    from benchmarks.balance import ROWS, WIDTH, OnZeros, Teacher

    torch.manual_seed(0)
    together = OnZeros(0.5, rows=rows, over_step=over_step)
    torch.nn.init.normal_(together.routed.routed_b)
    apart = RoutedLinear(WIDTH, WIDTH, together.routed.mode, balance=0.5)
    apart.load_state_dict(together.routed.state_dict())
    steps = BalanceOverSteps(dict(zip("ab", apart.tallies, strict=True)))
    steps.begin(ROWS // rows if over_step else 1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        inputs, targets = Teacher.drawn(0).batch(generator)
        for model in (together, apart):
            model.zero_grad()
        (together(inputs) - targets).square().mean().backward()
        together.routed.over_steps.end_step(lambda counts: counts)
        for some, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
            this_pass = everything(*some.shape[:2])
            this_pass.loss_gradient.value = rows / ROWS  # what accumulation does to the loss
            found = apart(torch.zeros_like(some), some, this_pass)
            ((found - wanted).square().mean() * rows / ROWS).backward()
        steps.end_step(lambda counts: counts)
        for name, parameter in apart.named_parameters():
            expected = together.routed.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)
