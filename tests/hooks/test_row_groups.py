"""The rows of a batch are divided among adapters: each sees its own rows, and a naive loop gives the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.row_groups import Rows
from llava_steering_plugin.modes.base import ForwardPass


class Scales(nn.Module):
    """Adds a multiple of the inputs on visual positions, and remembers the passes that it saw."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.seen: list[ForwardPass] = []

    def forward(self, output: Tensor, inputs: Tensor | None, this_pass: ForwardPass) -> Tensor:
        self.seen.append(this_pass)
        return output if inputs is None else output + self.factor * inputs * this_pass.visual[..., None]


@dataclass(eq=False)
class Adapted:
    """An adapter with one module."""

    modules: Mapping[str, nn.Module]
    at_decode: Mapping[str, nn.Module]


def adapter(factor: float, *, idle_at_decode: bool = False) -> Adapted:
    modules = {"host": Scales(factor)}
    return Adapted(modules, {} if idle_at_decode else modules)


def a_pass(rows: int, positions: int, *, decode: bool = False) -> ForwardPass:
    generator = torch.Generator().manual_seed(rows)
    visual = torch.randint(0, 2, (rows, positions), generator=generator).bool()
    return ForwardPass(visual, ~visual, torch.ones_like(visual), decode, {})


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_mixed_rows_give_what_a_loop_over_the_rows_gives(times: int, flat: bool) -> None:
    one, two = adapter(2.0), adapter(-3.0)
    adapters = [one, None, two, one]
    this_pass = a_pass(4 * times, 5)
    output, inputs = torch.randn(4 * times, 5, 6), torch.randn(4 * times, 5, 6)
    expected = output.clone()
    for row in range(4 * times):
        if (mine := adapters[row // times]) is not None:
            expected[row] += mine.modules["host"].factor * inputs[row] * this_pass.visual[row, :, None]
    found = output.clone()
    if flat:
        found, inputs = found.view(-1, 6), inputs.view(-1, 6)
    for group in Rows(adapters).groups(this_pass):
        found = group.updated(group.modules["host"], found, inputs)
    assert torch.equal(found.view_as(expected), expected)


def test_rows_of_one_adapter_are_a_single_group_of_all_rows() -> None:
    one = adapter(2.0)
    this_pass = a_pass(2, 3)
    (group,) = Rows([one, one]).groups(this_pass)
    assert group.rows is None
    output = torch.randn(2, 3, 4)
    group.updated(one.modules["host"], output, output)
    assert torch.equal(one.modules["host"].seen[0].visual, this_pass.visual)


def test_an_adapter_that_is_idle_at_decode_steps_has_no_group_there() -> None:
    idle, busy = adapter(1.0, idle_at_decode=True), adapter(1.0)
    rows = Rows([idle, busy])
    assert len(rows.groups(a_pass(2, 3))) == 2
    (group,) = rows.groups(a_pass(2, 1, decode=True))
    assert group.modules is busy.modules
    assert Rows([idle, None]).groups(a_pass(2, 1, decode=True)) == ()


def test_each_adapter_keeps_its_own_things_from_the_prefill_to_the_decode_steps() -> None:
    rows = Rows([adapter(1.0), adapter(2.0)])
    first, second = rows.groups(a_pass(2, 3))
    first.this_pass.kept["choice"] = 1
    again, other = rows.groups(a_pass(2, 1, decode=True))
    assert again.this_pass.kept == {"choice": 1} and other.this_pass.kept == {}
    assert second.this_pass.kept is other.this_pass.kept


def test_a_host_without_inputs_is_updated_all_the_same() -> None:
    one = adapter(1.0)
    (group,) = Rows([None, one]).groups(a_pass(2, 3))
    output = torch.randn(2, 3, 4)
    assert torch.equal(group.updated(one.modules["host"], output.clone(), None), output)
    assert len(one.modules["host"].seen) == 1


def test_an_output_that_autograd_may_need_is_copied_and_any_other_is_written_into() -> None:
    one = adapter(1.0)
    (group,) = Rows([None, one]).groups(a_pass(2, 3))
    for gradient in (False, True):
        output = torch.randn(2, 3, 4).requires_grad_(gradient)
        before, inputs = output.detach().clone(), torch.ones(2, 3, 4)
        found = group.updated(one.modules["host"], output, inputs)
        assert not torch.equal(found, before)
        assert torch.equal(output.detach(), before) is gradient


@pytest.mark.parametrize(
    ("shape", "message"),
    [((7, 4), r"returned \[7, 4\] where the pass has \[2, 3\]"), ((3, 2, 4), "same adapter")],
)
def test_an_output_of_unknown_rows_is_refused(shape: tuple[int, ...], message: str) -> None:
    one = adapter(1.0)
    (group,) = Rows([None, one]).groups(a_pass(2, 3))
    with pytest.raises(TokenMapError, match=message):
        group.updated(one.modules["host"], torch.randn(shape), torch.randn(shape))


def test_rows_that_are_no_multiple_of_the_named_ones_are_refused() -> None:
    names: list[Any] = [adapter(1.0), None]
    with pytest.raises(TokenMapError, match="named for 2 rows and the hidden states have 3"):
        Rows(names).groups(a_pass(3, 4))
