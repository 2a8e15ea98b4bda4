"""Routers: the load-balance loss, noise on their scores, and the figures that are logged of them."""

from __future__ import annotations

import pytest
import torch
from routed import SMALL, everything, routed

from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear
from llava_steering_plugin.modes.mixlora_routing import best


def test_the_balance_loss_has_the_gradient_of_its_formula_times_the_losss_scale() -> None:
    mode, weight, scale = MixLoRA(**SMALL, conditional=False), 0.3, 512.0
    module, balanced = routed(mode), RoutedLinear(12, 10, mode, balance=weight)
    balanced.load_state_dict(module.state_dict())
    output, inputs = torch.randn(5, 7, 10), torch.randn(5, 7, 12)
    found = []
    for one in (module, balanced):
        step = everything(5, 7)
        step.loss_gradient.note(torch.tensor(scale))
        (scale * one(output.clone(), inputs, step).sum()).backward()
        found.append(one.router_a.grad)
    pooled = inputs.mean(1)
    probability = (pooled @ module.router_a.T).softmax(1)
    share = torch.bincount(best(probability, mode.rank).flatten(), minlength=6) / (5 * mode.rank)
    loss = weight * mode.factors * (share * probability.mean(0)).sum()
    (expected,) = torch.autograd.grad(scale * loss, module.router_a)
    torch.testing.assert_close(found[1] - found[0], expected, atol=2e-2, rtol=1e-3)


def test_balancing_spreads_a_collapsed_router_over_its_factors() -> None:
    module = RoutedLinear(12, 10, MixLoRA(8, 2, conditional=False), balance=1.0)
    inputs = torch.randn(32, 1, 12) + 2
    with torch.no_grad():
        module.router_a[:2] = 1.0  # everything goes to the first two
    optimizer = torch.optim.Adam([module.router_a], lr=0.05)
    shares = []
    for _ in range(150):
        step = everything(32, 1)
        module(torch.zeros(32, 1, 10), inputs, step).sum().backward()
        optimizer.step()
        module.zero_grad()
        shares.append(torch.bincount(step.kept[module].a.flatten(), minlength=8).max() / 64)
    assert shares[0] > 0.45
    assert shares[-1] < 0.3


def test_noise_changes_choices_in_training_only() -> None:
    module = routed(MixLoRA(**SMALL, noise=5.0))
    inputs = torch.randn(4, 3, 12)

    def choice() -> list[int]:
        step = everything(4, 3)
        module(torch.zeros(4, 3, 10), inputs, step)
        return step.kept[module].a.flatten().tolist()

    assert len({tuple(choice()) for _ in range(5)}) > 1
    module.eval()
    assert len({tuple(choice()) for _ in range(5)}) == 1


def test_the_report_tells_a_sure_and_collapsed_router_from_an_undecided_one() -> None:
    mode = MixLoRA(8, 1, conditional=False)
    module = RoutedLinear(8, 8, mode)
    assert mode.report({"q": module}) == {}
    with torch.no_grad():
        module.router_a.zero_()
        module.router_b.copy_(100 * torch.eye(8))
    for _ in range(3):
        module(torch.zeros(8, 1, 8), torch.eye(8).unsqueeze(1), everything(8, 1))
    report = mode.report({"q": module})
    assert report == pytest.approx(
        {"mixlora_entropy_a": 1.0, "mixlora_factors_a": 1.0, "mixlora_entropy_b": 0.0, "mixlora_factors_b": 8.0}
    )
    assert mode.report({"q": module}) == {}, "it reports what happened since the last report"
