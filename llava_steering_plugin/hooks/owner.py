"""Own a model: open a scope for each of its calls, describe its passes, and give it back as it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.hooks import padding
from llava_steering_plugin.hooks.checkpointing import (
    bound_to_scope,
    change_checkpointing,
    checkpointing_parts,
    unbound,
)
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.hooks.families import SPLICE, family_of
from llava_steering_plugin.hooks.finite_rows import FiniteRows, end_token, report, watched
from llava_steering_plugin.hooks.passes import StackCall, describe_pass
from llava_steering_plugin.hooks.scope import Scope, current, entered, opened
from llava_steering_plugin.hooks.token_map import spliced
from llava_steering_plugin.modes.base import ForwardPass, LossGradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The attribute of the model that holds its owner. A plain attribute and no child module: an adapter's modules are
# children of the layers.
ATTRIBUTE = "llava_steering"


class ModelOwner:
    """Owns one model instance: shadows three of its methods, and describes every pass through its decoder.

    A call's scope is opened in the shadow of `forward`. Where other code has put a `forward` of its own over it, as
    trainers do, hooks on the model open the scope before that one runs.

    Attributes:
        model: the whole model, with its language-model head.
        family: its family.
        stack, shape: its decoder.

    Raises:
        SteeringError: the model has an owner already, or no decoder is found in it.
    """

    def __init__(self, model: PreTrainedModel):
        if owner_of(model) is not None:
            raise SteeringError("this model carries an adapter already; call remove_adapter(model) first.")
        self.model = model
        self.family = family_of(model)
        self.stack, self.shape = find_decoder(model)
        self._argument_names = list(inspect.signature(self.stack.forward).parameters)
        self._checkpointing = checkpointing_parts(self.stack, self.shape)
        self._hooks_of_calls: list[RemovableHandle] = []
        self._overridden: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}

    def take(self) -> None:
        """Begin to own the model: hook its decoder stack and shadow its methods."""
        if self.stack is not self.model:
            hook = self.stack.register_forward_pre_hook(self._describe_pass, with_kwargs=True)
            self._hooks_of_calls.append(hook)
        self._override("forward", self._forward)
        # One by one: where the second fails, the first is undone.
        enter = self.model.register_forward_pre_hook(self._enter_call, with_kwargs=True, prepend=True)
        self._hooks_of_calls.append(enter)
        self._hooks_of_calls.append(self.model.register_forward_hook(self._leave_call, always_call=True))
        if hasattr(self.model, "generate"):
            self._override("generate", self._generate)
        if self.family.splices:
            self._override(SPLICE, self._prepare)
        self.model.__dict__[ATTRIBUTE] = self

    def remove(self) -> None:
        """Give the model back as it was, to the bit."""
        self.release()

    def release(self) -> None:
        """Cease to own the model: undo `take`, also one that has failed half-way."""
        for hook in self._hooks_of_calls:
            hook.remove()
        if self._overridden:
            change_checkpointing(self._checkpointing, unbound)
        for name, (shadow, before) in self._overridden.items():
            # If other code has wrapped our method since then (mixed precision does), that wrapper stays; our method
            # only passes calls on from now.
            if self.model.__dict__.get(name) is shadow:
                del self.model.__dict__[name]
                if before is not None:
                    self.model.__dict__[name] = before
        self.model.__dict__.pop(ATTRIBUTE, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOwner:
        raise SteeringError(
            "a model with an adapter cannot be copied: the copy would share its scope. Call remove_adapter(model), "
            "copy, and load the adapter on the copy."
        )

    def _override(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadow the method `name` of the one model, not of its class: other models stay as they are."""
        before = self.model.__dict__.get(name)
        original = getattr(self.model, name)

        @functools.wraps(original)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            if owner_of(self.model) is not self:
                return original(*args, **kwargs)
            return wrapper(original, *args, **kwargs)

        self.model.__dict__[name] = shadow
        self._overridden[name] = (shadow, before)

    def _describe_pass(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave a description of the pass in its scope before the first layer runs: the stack's forward pre-hook."""
        # transformers sets the function in `train()` and may replace it, so it is looked at in every pass that may be
        # recomputed. In the others, decode steps above all, it would cost as much as all that follows.
        if torch.is_grad_enabled():
            change_checkpointing(self._checkpointing, bound_to_scope)
        scope = current()
        if scope is None:
            raise TokenMapError(
                f"{type(stack).__name__} was called on its own, so it is unknown which positions are visual. Call the "
                "whole model, or wrap the call in `with token_map(visual=mask):`."
            )
        scope.this_pass, scope.groups = None, ()
        if id(self) in scope.disabled:
            return
        call = StackCall.of({**dict(zip(self._argument_names, args, strict=False)), **kwargs})
        if scope.tokens is None and scope.generating and self.family.splices:
            scope.tokens = call.as_text()  # LLaVA's generate splices only where there are images
        self._enter_pass(scope, describe_pass(scope, call))

    def _enter_pass(self, scope: Scope, this_pass: ForwardPass) -> None:
        """Let the modules in the stack work in `this_pass`. An owner of several adapters divides it among them."""
        scope.this_pass = this_pass

    @contextmanager
    def _opened(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generating: bool) -> Iterator[Scope]:
        """Open the scope of one call; take out of `kwargs` what is meant for the owner alone."""
        with entered(opened(self, generating=generating)) as scope:
            yield scope

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is not None and scope.owner is self and (scope.generating or scope.awaits_forward):
            opened_by_hook, scope.awaits_forward = scope.awaits_forward, False
            result = self._run(scope, original, args, kwargs)
            if not opened_by_hook:
                return result
        else:
            with self._opened(args, kwargs, generating=False) as scope:
                result = self._run(scope, original, args, kwargs)
        _note_loss_gradient(result, scope.loss_gradient)
        return result

    def _run(self, scope: Scope, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model's own forward in the scope of the call."""
        self._begin(scope, args, kwargs)
        try:
            return self._or_of_base("forward", original)(*args, **kwargs)
        except ValueError as error:
            if (explained := self.family.explained(error)) is not None:
                raise explained from error
            raise

    def _begin(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the arguments of a forward say; begin the pass where the model is its decoder stack.

        A pre-hook of the stack would run before the scope of this call is open.
        """
        if scope.tokens is None and id(self) not in scope.disabled:
            scope.tokens = self.family.tokens(args, kwargs)
        if self.stack is self.model:
            self._describe_pass(self.stack, args, kwargs)

    def _enter_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Open the scope of a call, as the model's first forward pre-hook, if its `forward` is not the shadow.

        The other `forward` may call the shadow, which runs in this scope then, or may never do so.
        """
        scope = current()
        if model is not self.model or model.__dict__.get("forward") is self._overridden["forward"][0]:
            return None
        if scope is not None and scope.owner is self and scope.generating:
            return None
        kwargs = dict(kwargs)
        with ExitStack() as closing:
            scope = closing.enter_context(self._opened(args, kwargs, generating=False))
            scope.awaits_forward = True
            self._begin(scope, args, kwargs)
            scope.closing = closing.pop_all()
        return args, kwargs

    def _leave_call(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Close what `_enter_call` has opened: a forward hook that also runs where the call has failed."""
        scope = current()
        if model is not self.model or scope is None or scope.owner is not self or scope.closing is None:
            return
        closing, scope.closing = scope.closing, None
        closing.close()
        if result is None or not scope.awaits_forward:
            return
        if id(self) in scope.disabled and self._base() is not None:
            raise SteeringError(
                f"the forward of this {type(model).__name__} was replaced by other code after the adapter came on, so "
                "the base, whose own parts the adapter has changed, cannot answer. Call remove_adapter(model) first."
            )
        _note_loss_gradient(result, scope.loss_gradient)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = padding.on_the_left(self.model, args, kwargs, spliced=self.family.splices)
        with self._opened(args, kwargs, generating=True) as scope:
            rows = FiniteRows(end_token(self.model, kwargs))
            args, kwargs = watched(original, args, kwargs, rows)
            result = self._or_of_base("generate", original)(*args, **kwargs)
        report(rows, self._rows_of(scope), functools.partial(self._named, scope))
        return result

    def _rows_of(self, scope: Scope) -> int | None:
        """Return the number of rows of a call; None if it is unknown."""
        return None

    def _named(self, scope: Scope, rows: list[int]) -> str:
        """Name, in a message, the adapters of some of the rows of a call."""
        return "the base" if id(self) in scope.disabled else "the adapter"

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        splice = self._or_of_base(SPLICE, original)
        if scope is None or scope.owner is not self or (id(self) in scope.disabled and not scope.generating):
            return splice(*args, **kwargs)
        result, tokens = spliced(splice, *args, **kwargs)
        if tokens is not None and scope.generating:
            result, tokens = padding.left_spliced(result, tokens)
        if tokens is not None:
            scope.tokens = tokens
        return result

    def _base(self) -> PreTrainedModel | None:
        """Return the model as it is without what the owner has changed; None if hooks and modules are all of it."""
        return None

    def _or_of_base(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method of the model or, where the owner is switched off, the same one of the base."""
        scope = current()
        base = self._base() if scope is not None and id(self) in scope.disabled else None
        return original if base is None else self._method_of(base, name)

    def _method_of(self, alike: PreTrainedModel, name: str) -> Callable[..., Any]:
        """Return a method of a look-alike of the model, without what the owner does to the model's."""
        alike.__dict__.pop(ATTRIBUTE, None)
        for each, (_, before) in self._overridden.items():
            # The owner's own, or what other code has put around it since (mixed precision does): this call is in there.
            if each in alike.__dict__:
                del alike.__dict__[each]
                if getattr(before, "__self__", None) is self.model:  # such as mixed precision, put on before
                    alike.__dict__[each] = MethodType(before.__func__, alike)  # type: ignore[union-attr]
        found: Callable[..., Any] = getattr(alike, name)
        return found


def owner_of(model: PreTrainedModel) -> ModelOwner | None:
    """Return the owner of `model`; None if it has none."""
    found: ModelOwner | None = model.__dict__.get(ATTRIBUTE)
    return found


def _note_loss_gradient(result: Any, loss_gradient: LossGradient) -> None:
    """Have the backward pass of a loss begin with noting the gradient that reaches it, for `ForwardPass.loss_scale`."""
    loss = result[0] if isinstance(result, tuple) and result else getattr(result, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
        loss.register_hook(loss_gradient.note)  # type: ignore[no-untyped-call]
