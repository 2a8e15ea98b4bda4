"""Divide the rows of a batch among adapters: each row goes through its own adapter's modules, and no others."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import ForwardPass

# Further arguments of modules that take none.
_NONE: Mapping[str, Any] = {}


class Adapter(Protocol):
    """An adapter whose modules work on a model without being part of it.

    Attributes:
        modules: by the path of their host below the decoder stack.
        at_decode: those of them that are called at decode steps; the others change nothing there.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def at_decode(self) -> Mapping[str, nn.Module]: ...


@dataclass(frozen=True)
class Group:
    """The rows of one pass that share an adapter.

    Attributes:
        modules: of the adapter that work in the pass, by the path of their host.
        this_pass: describes the pass for these rows alone.
        rows: int64 [rows of the group], their numbers in the batch; None if they are all rows of the pass.
        of: the numbers of rows and positions of the whole pass.
        span: the same rows, where they follow each other: they need not be copied then.
    """

    modules: Mapping[str, nn.Module]
    this_pass: ForwardPass
    rows: Tensor | None
    of: tuple[int, int]
    span: slice | None = None
    _latest: list[Any] = field(default_factory=list, repr=False, compare=False)

    def updated(self, module: nn.Module, output: Tensor, inputs: Any, further: Mapping[str, Any] = _NONE) -> Tensor:
        """Return `output` of the whole batch with the rows of this group updated by `module`; may write into it.

        Args:
            module: of the group's adapter, for the present host.
            output: [rows, positions, features] of the host, or [rows * positions, features].
            inputs: of the host, in the same form; anything else than a tensor counts as none.
            further: arguments of the module.

        Raises:
            TokenMapError: the host's output has other rows and positions than the pass.
        """
        if self.rows is None:
            result: Tensor = module(output, inputs, self.this_pass, **further)
            return result
        if self.span is not None and not output.requires_grad:
            mine = self._by_rows(output)[self.span]
            read = self._rows_of(inputs, self.span) if getattr(module, "reads_inputs", True) else None
            part: Tensor = module(mine, read, self.this_pass, **further)
            if part.data_ptr() != mine.data_ptr():
                mine.copy_(part)
            return output
        rows = self.this_pass.once(("rows", output.device), lambda: _on(self.rows, output.device))
        read = self._rows_of(inputs, rows) if getattr(module, "reads_inputs", True) else None
        part = module(self._by_rows(output)[rows], read, self.this_pass, **further)
        # In place, as the host's output has no other reader yet and a copy would cost more than the update. Autograd,
        # however, may need the output unchanged.
        whole = output.clone() if output.requires_grad else output
        self._by_rows(whole).index_copy_(0, rows, part)
        return whole

    def _rows_of(self, inputs: Any, rows: Tensor | slice) -> Tensor | None:
        """Return the group's rows of a host's input; of one tensor the same ones, for hosts that are called on it."""
        if not isinstance(inputs, Tensor):
            return None
        version = None if inputs.is_inference() else inputs._version
        if self._latest and self._latest[0]() is inputs and self._latest[1] == version:
            found: Tensor = self._latest[2]
            return found
        part = self._by_rows(inputs)[rows]
        self._latest[:] = weakref.ref(inputs), version, part
        return part

    def _by_rows(self, hidden: Tensor) -> Tensor:
        """View hidden states, whose rows and positions may be flattened into one, as [rows, positions, features]."""
        if hidden.shape[:-1] == self.of:
            return hidden
        if hidden.shape[:-1] != (self.of[0] * self.of[1],):
            raise TokenMapError(
                f"a part of the decoder returned {list(hidden.shape)} where the pass has {list(self.of)} rows and "
                "positions, so the rows of its tokens are unknown (as in the experts of a mixture). Give all rows of a "
                "batch the same adapter, one batch for each adapter."
            )
        return hidden.view(*self.of, -1)


def at_once(
    groups: Sequence[Group], mine: Sequence[tuple[Group, Any]], dtype: torch.dtype
) -> Sequence[tuple[Group, Any]]:
    """Return who updates which rows at a host: one for all rows where modules of several adapters can be one.

    Modules say so with a function `at_once(modules, passes, dtype)`. It is asked at decode steps, and returns what is
    called as a module for all of their rows, one adapter after the other, or None.

    Args:
        groups: of the pass.
        mine: those that have a module for the host, with it.
        dtype: of the host's output.
    """
    first, module = mine[0]
    make = getattr(module, "at_once", None)
    if make is None or not 1 < len(mine) == len(groups) or not first.this_pass.decode:
        return mine
    if any(type(other) is not type(module) or other._forward_hooks or other._forward_pre_hooks for _, other in mine):
        return mine
    update = make([other for _, other in mine], [group.this_pass for group, _ in mine], dtype)
    return mine if update is None else [(first.this_pass.once("all groups", lambda: _union(groups)), update)]


def _union(groups: Sequence[Group]) -> Group:
    """Return the rows of several groups as one, in their order."""
    first, spans = groups[0], [group.span for group in groups]
    visual, text, prompt = (
        torch.cat([getattr(group.this_pass, name) for group in groups]) for name in ("visual", "text", "prompt")
    )
    # What is kept for later steps stays with each adapter.
    this_pass = ForwardPass(visual, text, prompt, True, {}, loss_gradient=first.this_pass.loss_gradient)
    rows = torch.cat([group.rows for group in groups if group.rows is not None])
    follow = all(one and other and one.stop == other.start for one, other in pairwise(spans))
    span = slice(spans[0].start, spans[-1].stop) if follow and spans[0] and spans[-1] else None
    return Group({}, this_pass, rows, first.of, span)


class Rows:
    """The adapters of the rows of one call; divides the passes of the call among them.

    Args:
        adapters: one for each row of the call's batch, or one for them all; None is the plain base.
    """

    def __init__(self, adapters: Sequence[Adapter | None]):
        self.adapters = tuple(adapters)
        self.active = tuple(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
        self._at_decode = tuple(adapter for adapter in self.active if adapter.at_decode)
        self._kept: dict[Adapter, dict[Hashable, Any]] = {adapter: {} for adapter in self.active}
        self._numbers: dict[tuple[int, torch.device], dict[Adapter, Tensor | None]] = {}
        self._spans = {adapter: self._span(adapter) for adapter in self.active}

    def groups(self, this_pass: ForwardPass) -> tuple[Group, ...]:
        """Return the rows of a pass by adapter, without the adapters that have nothing to do in it.

        Raises:
            TokenMapError: the rows of the pass are no multiple of those of the call.
        """
        working = self._at_decode if this_pass.decode else self.active
        if not working:
            return ()
        rows, positions = this_pass.visual.shape
        numbers = self._numbers_of(rows, this_pass.visual.device)
        return tuple(self._group(this_pass, adapter, numbers[adapter], (rows, positions)) for adapter in working)

    def keep(self, part: Rows) -> None:
        """Take over what the prefill of `part`, all rows of some adapters, has left for decode steps."""
        for adapter in part.active:
            self._kept[adapter] = part._kept[adapter]

    def _group(self, this_pass: ForwardPass, adapter: Adapter, rows: Tensor | None, of: tuple[int, int]) -> Group:
        masks = (this_pass.visual, this_pass.text, this_pass.prompt)
        span = None
        if rows is not None:
            if (mine := self._spans[adapter]) is not None:
                times = of[0] // len(self.adapters)
                span = slice(mine.start * times, mine.stop * times)
            place = rows if span is None else span
            masks = (this_pass.visual[place], this_pass.text[place], this_pass.prompt[place])
        part = ForwardPass(*masks, this_pass.decode, self._kept[adapter], loss_gradient=this_pass.loss_gradient)
        return Group(adapter.at_decode if this_pass.decode else adapter.modules, part, rows, of, span)

    def _span(self, adapter: Adapter) -> slice | None:
        """Return the rows of an adapter if they follow each other."""
        mine = [row for row, other in enumerate(self.adapters) if other is adapter]
        return slice(mine[0], mine[-1] + 1) if mine[-1] - mine[0] + 1 == len(mine) else None

    def _numbers_of(self, rows: int, device: torch.device) -> dict[Adapter, Tensor | None]:
        """Return every adapter's row numbers in a pass of `rows` rows, in which the call's rows may be repeated.

        None if all rows have the same adapter.
        """
        if (rows, device) not in self._numbers:
            times, rest = divmod(rows, len(self.adapters))
            if rest:
                raise TokenMapError(
                    f"adapters are named for {len(self.adapters)} rows and the hidden states have {rows}, which is no "
                    "multiple of it. Name one adapter for each row of the batch."
                )
            self._numbers[rows, device] = {
                adapter: self._repeated(adapter, times).to(device) if len(set(self.adapters)) > 1 else None
                for adapter in self.active
            }
        return self._numbers[rows, device]

    def _repeated(self, adapter: Adapter, times: int) -> Tensor:
        mine = torch.tensor([other is adapter for other in self.adapters])
        return mine.repeat_interleave(times).nonzero().squeeze(1)


def _on(rows: Tensor | None, device: torch.device) -> Tensor:
    assert rows is not None
    return rows.to(device)
