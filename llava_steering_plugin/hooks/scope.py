"""For how long a token map holds: one scope per forward or generation, in a context variable.

A context variable rather than an attribute of the model, because threads that share a model must not see each other's
images. It starts empty in a new thread, so `generate` and `forward` open their scope themselves, in whichever thread
they run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.token_map import TokenMap
from llava_steering_plugin.modes.base import ForwardPass, LossGradient

if TYPE_CHECKING:
    from llava_steering_plugin.hooks.row_groups import Group, Rows


@dataclass
class Scope:
    """What one forward or one generation knows.

    Attributes:
        owner: the attachment that opened it; None for a user's `token_map` or `disabled` block.
        tokens: the token map, None while unknown.
        generating: opened by `generate`: the forwards inside share it, and a missing map means text only.
        disabled: ids of the owners that a surrounding `disabled(model)` block switched off.
        names: what a surrounding `using(model, ...)` block chose, by the id of the model's pool.
        kept: what a prefill leaves for the decode steps of the same generation.
        loss_gradient: the gradient of the loss of this forward, known from its backward pass on.
        this_pass: the pass that the decoder stack is in, None where the adapter must stay out.
        rows: which adapter each row has, where the owner is a pool of several.
        groups: the rows of the present pass that an adapter has something to do for; empty where there are none.
    """

    owner: object | None = None
    tokens: TokenMap | None = None
    generating: bool = False
    disabled: frozenset[int] = frozenset()
    names: Mapping[int, str | Sequence[str]] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)
    loss_gradient: LossGradient = field(default_factory=LossGradient)
    this_pass: ForwardPass | None = None
    rows: Rows | None = None
    groups: tuple[Group, ...] = ()


_current: ContextVar[Scope | None] = ContextVar("llava_steering_scope", default=None)


def current() -> Scope | None:
    """The scope that this thread is in."""
    return _current.get()


@contextmanager
def entered(scope: Scope) -> Iterator[Scope]:
    """Makes `scope` the current one for the block, whatever leaves the block."""
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def opened(owner: object, *, generating: bool = False, tokens: TokenMap | None = None) -> Scope:
    """A new scope for `owner` that inherits what a surrounding `token_map` or `disabled` block says."""
    inherited = _handed_on()
    return replace(inherited, owner=owner, generating=generating, tokens=tokens or inherited.tokens)


def _handed_on() -> Scope:
    """A new scope with what the present one hands on to scopes inside it."""
    around = current()
    if around is None:
        return Scope()
    # A map belongs to the batch it was made for: only a user's own block hands it on, never another model's forward.
    return Scope(tokens=around.tokens if around.owner is None else None, disabled=around.disabled, names=around.names)


@contextmanager
def without(owner: object) -> Iterator[None]:
    """Inside the block, and in this thread, `owner` stays out of its model."""
    inherited = _handed_on()
    with entered(replace(inherited, disabled=inherited.disabled | {id(owner)})):
        yield


@contextmanager
def naming(owner: object, names: str | Sequence[str]) -> Iterator[None]:
    """Inside the block, and in this thread, the pool `owner` runs the adapters `names` where a call names none."""
    inherited = _handed_on()
    with entered(replace(inherited, names={**inherited.names, id(owner): names})):
        yield


@contextmanager
def token_map(visual: Tensor, attention: Tensor | None = None, prompt: Tensor | None = None) -> Iterator[None]:
    """Says which positions are visual, for models that are called with ready-made `inputs_embeds`.

        with token_map(visual=mask, attention=mask):
            model(inputs_embeds=embeds)

    Args:
        visual: bool [rows, positions].
        attention: bool or 0/1 [rows, positions], 1 where there is no padding; None: no padding anywhere.
        prompt: bool [rows, positions], the positions before the first supervised one; None: all but padding.

    Raises:
        TokenMapError: the shapes differ, or a visual position is padding.
    """
    attended = torch.ones_like(visual, dtype=torch.bool) if attention is None else attention.bool()
    prompted = attended if prompt is None else prompt.bool() & attended
    visual = visual.bool()
    shapes = {"visual": visual.shape, "attention": attended.shape, "prompt": prompted.shape}
    if visual.dim() != 2 or len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise TokenMapError(f"token_map() needs masks of one shape [rows, positions]; got {listed}.")
    if bool((visual & ~attended).any()):
        raise TokenMapError("token_map() got visual positions that `attention` marks as padding; clear them in one.")
    with entered(replace(_handed_on(), tokens=TokenMap(visual, attended, prompted))):
        yield
