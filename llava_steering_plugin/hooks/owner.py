"""A model whose calls open and close scopes, and that can be given back as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.hooks.passes import unwatch, watch
from llava_steering_plugin.hooks.scope import Scope, current, entered, opened
from llava_steering_plugin.hooks.token_map import spliced
from llava_steering_plugin.modes.base import LOSS_GRADIENT, ForwardPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Plain attribute of the model that carries its owner. Not a child module: the modules hang on the layers.
ATTRIBUTE = "llava_steering"


class ModelOwner:
    """Owns one model instance: shadows three of its methods, and has every pass through its decoder described.

    Attributes:
        model: the whole model, with its language-model head.
        stack, shape: its decoder.

    Raises:
        SteeringError: the model has an owner already, or no decoder is found in it.
    """

    def __init__(self, model: PreTrainedModel):
        if owner_of(model) is not None:
            raise SteeringError("this model carries an adapter already; call remove_adapter(model) first.")
        self.model = model
        self.stack, self.shape = find_decoder(model)
        self._watching: RemovableHandle | None = None
        self._overridden: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}

    def take(self) -> None:
        """Starts to own the model."""
        takes_images = hasattr(self.model, "prepare_inputs_labels_for_multimodal")
        self._watching = watch(self.stack, self.shape, self, takes_images, self._begin)
        self._override("forward", self._forward)
        if hasattr(self.model, "generate"):
            self._override("generate", self._generate)
        if takes_images:
            self._override("prepare_inputs_labels_for_multimodal", self._prepare)
        self.model.__dict__[ATTRIBUTE] = self

    def remove(self) -> None:
        """Gives the model back as it was, to the bit."""
        self.release()

    def release(self) -> None:
        """Stops to own the model."""
        if self._watching is not None:
            unwatch(self.stack, self.shape, self._watching)
        for name, (shadow, before) in self._overridden.items():
            # Whoever wrapped our method since then (mixed precision does) keeps it; it only passes calls on from now.
            if self.model.__dict__.get(name) is shadow:
                del self.model.__dict__[name]
                if before is not None:
                    self.model.__dict__[name] = before
        del self.model.__dict__[ATTRIBUTE]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOwner:
        raise SteeringError(
            "a model with an adapter cannot be copied: the copy would share its scope. Call remove_adapter(model), "
            "copy, and load the adapter on the copy."
        )

    def _override(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadows the method `name` of the one model, not of its class: other models stay as they are."""
        before = self.model.__dict__.get(name)
        original = getattr(self.model, name)

        @functools.wraps(original)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            if owner_of(self.model) is not self:
                return original(*args, **kwargs)
            return wrapper(original, *args, **kwargs)

        self.model.__dict__[name] = shadow
        self._overridden[name] = (shadow, before)

    def _begin(self, scope: Scope, step: ForwardPass) -> None:
        """A pass through the decoder begins."""
        scope.step = step

    @contextmanager
    def _opened(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generating: bool) -> Iterator[Scope]:
        """The scope of one call with these arguments; may take out of `kwargs` what is meant for the owner alone."""
        with entered(opened(self, generating=generating)) as scope:
            yield scope

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is not None and scope.owner is self and scope.generating:
            return original(*args, **kwargs)
        with self._opened(args, kwargs, generating=False) as scope:
            result = original(*args, **kwargs)
        _note_loss_gradient(result, scope.kept)
        return result

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._opened(args, kwargs, generating=True):
            return original(*args, **kwargs)

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is None or scope.owner is not self or id(self) in scope.disabled:
            return original(*args, **kwargs)
        result, tokens = spliced(original, *args, **kwargs)
        if tokens is not None:
            scope.tokens = tokens
        return result


def owner_of(model: PreTrainedModel) -> ModelOwner | None:
    """Whoever owns `model`, None without one."""
    found: ModelOwner | None = model.__dict__.get(ATTRIBUTE)
    return found


def _note_loss_gradient(result: Any, kept: dict[Hashable, Any]) -> None:
    """Has the backward pass of a loss begin with noting the gradient that reaches it, for `ForwardPass.loss_scale`."""
    loss = result[0] if isinstance(result, tuple) and result else getattr(result, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
        loss.register_hook(functools.partial(kept.__setitem__, LOSS_GRADIENT))  # type: ignore[no-untyped-call]
