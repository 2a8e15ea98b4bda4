"""Keep what is known of one forward or generation, above all its token map, in a scope that ends with it.

The scope is in a context variable and not in an attribute of the model, because threads that share a model must not see
each other's images. The variable is empty in a new thread, so `generate` and `forward` open their scope themselves, in
the thread that they run in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    """The state of one forward or one generation.

    Attributes:
        owner: the owner of the model that opened it; None for a user's `token_map` or `disabled` block.
        tokens: the token map; None while unknown.
        generating: True if `generate` opened it: its forwards share the scope, and a missing map means text only.
        disabled: ids of the owners that are switched off, by a surrounding `disable_adapter(model)` block or because
            no row has an adapter.
        names: adapters chosen by a surrounding `use_adapter(model, ...)` block, by the id of the model's pool.
        kept: what a prefill leaves for the decode steps of the same generation.
        loss_gradient: the gradient with which the backward pass of this forward's loss begins.
        this_pass: the pass that the decoder stack is in; None where the adapter is switched off, and in pools.
        rows: the adapters of the rows, where the owner is a pool.
        groups: the rows of the present pass by adapter, where the owner is a pool; only adapters with something to do.
        closing: closes the scope, where hooks on the model have opened it; else None.
        awaits_forward: True until the model's own `forward` is called in a scope that hooks have opened.
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
    closing: ExitStack | None = None
    awaits_forward: bool = False


_current: ContextVar[Scope | None] = ContextVar("llava_steering_scope", default=None)


def current() -> Scope | None:
    """Return the scope that this thread is in; None outside all of them."""
    return _current.get()


@contextmanager
def entered(scope: Scope) -> Iterator[Scope]:
    """Make `scope` the current one for the block, however the block ends."""
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def opened(owner: object, *, generating: bool = False, tokens: TokenMap | None = None) -> Scope:
    """Return a new scope for `owner`, which inherits from surrounding `token_map` and `disable_adapter` blocks."""
    inherited = _handed_on()
    return replace(inherited, owner=owner, generating=generating, tokens=tokens or inherited.tokens)


def _handed_on() -> Scope:
    """Return a new scope with what the present one hands on to scopes inside it."""
    around = current()
    if around is None:
        return Scope()
    # A map belongs to one batch: a user's own block hands it on, another model's forward does not.
    return Scope(tokens=around.tokens if around.owner is None else None, disabled=around.disabled, names=around.names)


@contextmanager
def without(owner: object) -> Iterator[None]:
    """Switch off, for the block and in this thread, all that `owner` does to its model."""
    inherited = _handed_on()
    with entered(replace(inherited, disabled=inherited.disabled | {id(owner)})):
        yield


@contextmanager
def naming(owner: object, names: str | Sequence[str]) -> Iterator[None]:
    """Choose the adapters of the pool `owner` for calls in the block, and in this thread, that name none."""
    inherited = _handed_on()
    with entered(replace(inherited, names={**inherited.names, id(owner): names})):
        yield


@contextmanager
def token_map(visual: Tensor, attention: Tensor | None = None, prompt: Tensor | None = None) -> Iterator[None]:
    """Declare which positions are visual, for calls in the block with ready-made `inputs_embeds`.

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
