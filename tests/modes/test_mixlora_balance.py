"""The load-balance loss sees a whole optimizer step: what is counted, what is not, and what stays as it was.

Covers `modes/mixlora_balance.py`; what it is worth is measured in test_mixlora_learning.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from routed import LONG, SETTINGS, SHORT, adapted, batch, everything, routed, small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_steering_plugin import token_map
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps, Tally, frequency, shares

# Of six factors two are chosen for each row.
CHOSEN = torch.tensor([[0, 1], [0, 2], [0, 5]])
OWN = torch.tensor([3, 1, 1, 0, 0, 1]) / 6
BEFORE = torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25, 0.0])


def tally(passes: int, before: Tensor | None = None) -> Tally:
    made = Tally(6)
    BalanceOverSteps({"one": made}).begin(passes)
    made.before = before
    return made


def shares_of(tally: Tally, chosen: Tensor, *, counted: bool) -> Tensor:
    return shares([tally], chosen.view(1, -1), counted=counted)[0]


@pytest.mark.parametrize("before", [None, BEFORE], ids=["first step", "later"])
def test_one_pass_a_step_has_its_own_shares_to_the_bit_and_nothing_is_remembered(before: Tensor | None) -> None:
    alone = tally(1, before)
    for _ in range(2):
        assert torch.equal(shares_of(alone, CHOSEN, counted=True), frequency(CHOSEN.view(1, -1), 6)[0])
    assert alone.counts is None


@pytest.mark.parametrize("passes", [2, 4, 32])
def test_of_n_passes_a_pass_is_one_nth_and_the_step_before_is_the_rest(passes: int) -> None:
    torch.testing.assert_close(shares_of(tally(passes), CHOSEN, counted=True), OWN)
    later = tally(passes, BEFORE)
    for _ in range(2):  # the same for every pass of the step, so that their order and their ranks make no difference
        found = shares_of(later, CHOSEN, counted=True)
        torch.testing.assert_close(found, OWN / passes + BEFORE * (1 - 1 / passes))
        assert float(found.sum()) == pytest.approx(1)


def test_the_next_step_sees_the_choices_of_all_passes_and_ranks() -> None:
    mine, silent = Tally(6), Tally(6)
    steps = BalanceOverSteps({"mine": mine, "silent": silent})
    steps.begin(4)
    shares_of(mine, CHOSEN, counted=True)
    shares_of(mine, CHOSEN[:1], counted=True)
    shares_of(mine, CHOSEN[1:], counted=False)
    other_rank = torch.tensor([[0, 0, 0, 8, 0, 0], [0, 0, 0, 0, 2, 2]], dtype=torch.float32)
    steps.end_step(lambda counts: counts + other_rank)
    assert mine.before is not None and silent.before is not None
    torch.testing.assert_close(mine.before, torch.tensor([4, 2, 1, 8, 0, 1]) / 16)
    torch.testing.assert_close(silent.before, torch.tensor([0, 0, 0, 0, 1, 1]) / 2)
    assert mine.counts is None
    # A step in which nobody chose anything leaves what was known.
    steps.end_step(lambda counts: counts)
    torch.testing.assert_close(silent.before, torch.tensor([0, 0, 0, 0, 1, 1]) / 2)


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_what_ranks_add_up_has_one_shape_whatever_a_rank_has_seen(seen: int) -> None:
    """Otherwise the ranks wait for each other for ever."""
    steps = BalanceOverSteps({"a": Tally(6), "b": Tally(6)})
    steps.begin(2)
    for one in list(steps.tallies.values())[:seen]:
        shares_of(one, CHOSEN, counted=True)
    shapes = []

    def add_up(counts: Tensor) -> Tensor:
        shapes.append((counts.shape, counts.dtype))
        return counts

    for _ in range(2):
        steps.end_step(add_up)
    assert shapes == [((2, 6), torch.float32)] * 2


def test_a_state_goes_through_json_to_the_bit_and_the_first_step_has_none() -> None:
    steps = BalanceOverSteps({"a": Tally(6), "b": Tally(6)})
    steps.begin(2)
    assert steps.state() == {}
    steps.tallies["a"].before = torch.rand(6, generator=torch.Generator().manual_seed(0))
    again = BalanceOverSteps({"a": Tally(6), "b": Tally(6)})
    again.load(json.loads(json.dumps(steps.state())))
    assert again.tallies["b"].before is None
    assert again.tallies["a"].before is not None
    assert torch.equal(again.tallies["a"].before, steps.tallies["a"].before)


def test_every_router_that_is_balanced_is_led_through_the_training_and_no_other() -> None:
    module = routed(MixLoRA(6, 2), balance=0.1)
    led = MixLoRA(6, 2).statistics({"layers.0.q_proj": module, "other": torch.nn.Linear(2, 2)})
    assert isinstance(led, BalanceOverSteps) and list(led.tallies) == ["layers.0.q_proj.a", "layers.0.q_proj.b"]
    for silent in (MixLoRA(6, 2, balance=0.0), MixLoRA(6, 2, router_grad="none"), MixLoRA(1, 1)):
        led = silent.statistics({"layers.0.q_proj": module})
        assert led is not None and not led.tallies
    assert MixLoRA(6, 2).statistics({}) is None


def evaluated(module: Any) -> None:
    module.eval()
    with torch.no_grad():
        module(torch.zeros(2, 5, 10), torch.randn(2, 5, 12), everything(2, 5))


def evaluated_with_gradients(module: Any) -> None:
    module.eval()
    module(torch.zeros(2, 5, 10), torch.randn(2, 5, 12), everything(2, 5)).sum().backward()


def first_run_of_a_checkpointed_layer(module: Any) -> None:
    with torch.no_grad():
        module(torch.zeros(2, 5, 10), torch.randn(2, 5, 12), everything(2, 5))


def recomputed(module: Any) -> None:
    hidden, this_pass = torch.randn(2, 5, 12), everything(2, 5)
    for _ in range(2):
        module(torch.zeros(2, 5, 10), hidden, this_pass).sum().backward()


@pytest.mark.parametrize(
    ("run", "choices"),
    [(evaluated, 0), (evaluated_with_gradients, 0), (first_run_of_a_checkpointed_layer, 0), (recomputed, 4)],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_a_pass_counts_once_and_only_in_training(run: Callable[[Any], None], choices: int) -> None:
    module = routed(MixLoRA(6, 2), balance=0.1).train()
    BalanceOverSteps(dict(zip("ab", module.tallies, strict=True))).begin(2)
    run(module)
    assert [0 if each.counts is None else float(each.counts.sum()) for each in module.tallies] == [choices, choices]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_llama()


def loss_of(model: Any, rows: list[list[int]]) -> Tensor:
    ids, attention = batch(*rows, side="right")
    labels = ids.masked_fill(~attention.bool(), -100)
    labels[:, :2] = -100
    prompt = (labels != -100).cumsum(1) == 0
    with token_map(torch.zeros_like(prompt), attention, prompt):
        loss: Tensor = model(ids, attention_mask=attention, labels=labels).loss
    return loss


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not reentrant"])
def test_two_accumulated_steps_in_a_model_are_balanced_alike_with_checkpointing(
    base: LlamaForCausalLM, checkpointing: bool | None
) -> None:
    """The counts of a step, and the gradients of the next one, which they change."""
    micro_batches = [[SHORT, LONG], [LONG[::-1], SHORT[::-1]]]
    plain, found = (_two_steps(base, micro_batches, how) for how in (None, checkpointing))
    assert plain[0] == found[0] and len(plain[0].pop("together")) == 2 * 2, "q, k, v and gate, up of both layers"
    assert all(sum(shares) == pytest.approx(1) for shares in plain[0].values())
    for name, gradient in plain[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    by_pass = _two_steps(base, micro_batches, checkpointing, passes=1)
    assert any(not torch.allclose(by_pass[1][name], value) for name, value in plain[1].items() if "router" in name)


def _two_steps(
    base: Any, micro_batches: list[list[list[int]]], checkpointing: bool | None, passes: int = 2
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    with adapted(base, balance=0.5) as attachment:
        base.train().requires_grad_(False)
        for parameter in attachment.trained().values():
            parameter.requires_grad_(True)
        base.enable_input_require_grads()
        if checkpointing is not None:
            base.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        steps = MixLoRA(**SETTINGS).statistics(attachment.modules)
        assert steps is not None
        steps.begin(passes)
        try:
            for _ in range(2):
                base.zero_grad(set_to_none=True)
                for rows in micro_batches:
                    (loss_of(base, rows) / 2).backward()
                    base.eval()
                    with torch.no_grad():
                        loss_of(base, [LONG])  # a validation between the passes
                    base.train()
                steps.end_step(lambda counts: counts)
            gradients = {name: value.grad.clone() for name, value in attachment.trained().items()}
        finally:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()
            base.eval().zero_grad(set_to_none=True)
        return steps.state(), gradients
