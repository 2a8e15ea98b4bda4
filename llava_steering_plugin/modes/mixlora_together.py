"""Find out which linears are called on one tensor (q, k and v; gate and up), so that the first can work for all.

Nothing is known of a model's names: a linear belongs to those that were called on the very same tensor before it. So
the first pass finds that out, and later ones use it. Whether it holds is looked at in every call; a linear that gets
another tensor, or a changed one, works alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llava_steering_plugin.modes.base import ForwardPass

Member = TypeVar("Member", bound=Hashable)
Made = TypeVar("Made")
Members = tuple[Member, ...]


class Together(Generic[Member]):
    """Knows the modules that are called on one tensor, one after the other.

    Attributes:
        known: by the first of them; it is replaced when more are found, and never written into.
    """

    def __init__(self) -> None:
        self.known: dict[Member, Members[Member]] = {}

    def state(self, names: Mapping[Member, str]) -> list[list[str]]:
        """Return what is known, as plain JSON values.

        Args:
            names: of all modules.
        """
        return [[names[one] for one in members] for members in self.known.values()]

    def load(self, state: Sequence[Sequence[str]], names: Mapping[Member, str]) -> None:
        """Know what `state` returned. Modules that are not there are left out."""
        named = {name: one for one, name in names.items()}
        found = (tuple(named[name] for name in members if name in named) for members in state)
        self.known = {members[0]: members for members in found if members}

    def share(
        self, one: Member, inputs: Tensor, dtype: torch.dtype, this_pass: ForwardPass, make: Callable[..., Made]
    ) -> Made:
        """Return `make(members)`, made by the first of the members and used by those after it.

        Args:
            one: the module that is called.
            inputs: what it is called on.
            dtype: of what is made.
            make: called with the modules that will be called on `inputs`, as far as they are known; `one` is the first.
        """
        # A pass keeps to what was known when it began: gradient checkpointing repeats parts of it.
        calls = this_pass.once(("together", self), lambda: _Calls(self.known))
        if calls.continues(inputs, dtype):
            calls.members.append(one)
            if len(calls.members) > len(self.known.get(calls.members[0], ())):
                self.known = {**self.known, calls.members[0]: tuple(calls.members)}
        else:
            calls.begin(one, inputs, dtype)
        made: Made = calls.taken(one) if one in calls.waiting else calls.made_for(one, make)
        return made


class _Calls(Generic[Member]):
    """The latest calls of one pass: on which tensor they were, and what was made of it for calls to come."""

    def __init__(self, known: dict[Member, Members[Member]]):
        self.known = known
        self.members: list[Member] = []
        self.waiting: set[Member] = set()
        self._inputs: Callable[[], Tensor | None] = lambda: None
        self._about: tuple[Any, ...] = ()
        self._made: Any = None

    def continues(self, inputs: Tensor, dtype: torch.dtype) -> bool:
        """Say whether the call before was on this very tensor, and nothing has changed since."""
        return self._inputs() is inputs and self._about == _about(inputs, dtype)

    def begin(self, one: Member, inputs: Tensor, dtype: torch.dtype) -> None:
        self._inputs, self._about = weakref.ref(inputs), _about(inputs, dtype)
        self.members, self.waiting, self._made = [one], set(), None

    def made_for(self, one: Member, make: Callable[..., Made]) -> Made:
        members = self.known.get(one, (one,))
        made = make(members)
        if len(members) > 1:
            self.waiting, self._made = set(members[1:]), made
        return made

    def taken(self, one: Member) -> Any:
        made = self._made
        self.waiting.discard(one)
        if not self.waiting:
            self._made = None  # frees what it holds
        return made


def _about(inputs: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    # Inference tensors count no changes.
    return None if inputs.is_inference() else inputs._version, dtype, torch.is_grad_enabled()
