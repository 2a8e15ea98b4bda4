"""Puts a mode on a model, takes it off again, and switches it off for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin import registry
from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.hooks import layers
from llava_steering_plugin.hooks.scope import Scope, current, entered, opened
from llava_steering_plugin.hooks.tokens import spliced
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.zero import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Plain attribute of the model that carries its attachment. Not a child module: the modules hang on the layers.
ATTRIBUTE = "llava_steering"


class Attachment:
    """A mode's modules on one model, and everything that has to be undone to take them off.

    Attributes:
        model: the whole model, with its language-model head.
        mode: the mode and its settings.
        shape: the decoder's shape.
        modules: the modules, keyed by the path of their host below the decoder stack.
        extras: names of parameters of the model beside the modules that belong to the adapter: trained ones, and those
            that the base checkpoint does not hold.
        config: what training or loading knows of the adapter beside its mode; None for a fresh one.
    """

    def __init__(self, model: PreTrainedModel, mode: Mode):
        self.model, self.mode = model, mode
        self.stack, self.shape = layers.find_decoder(model)
        if problems := mode.problems(self.shape):
            raise ArgumentsError(listing(f"the tuning mode {mode.name!r} does not fit this model", problems))
        self.modules = mode.build(self.shape)
        self.extras: set[str] = set()
        self.config: AdapterConfig | None = None
        self._handles = layers.hang(self.stack, self.modules)
        takes_images = hasattr(model, "prepare_inputs_labels_for_multimodal")
        self._handles.append(layers.watch(self.stack, self.shape, self, takes_images))
        self._overridden: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}
        self._override("forward", self._forward)
        if hasattr(model, "generate"):
            self._override("generate", self._generate)
        if takes_images:
            self._override("prepare_inputs_labels_for_multimodal", self._prepare)
        model.__dict__[ATTRIBUTE] = self

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, named `<host path>.<name in the module>`."""
        return {
            f"{path}.{name}": parameter
            for path, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }

    def remove(self) -> None:
        """Takes the adapter off: the model is again what it was, to the bit."""
        layers.unhang(self.stack, self.modules, self._handles)
        for name, (shadow, before) in self._overridden.items():
            # Whoever wrapped our method since then (mixed precision does) keeps it; it only passes calls on from now.
            if self.model.__dict__.get(name) is shadow:
                del self.model.__dict__[name]
                if before is not None:
                    self.model.__dict__[name] = before
        del self.model.__dict__[ATTRIBUTE]

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        raise SteeringError(
            "a model with an adapter cannot be copied: the copy would share its scope. Call remove(model), copy, and "
            "load the adapter on the copy."
        )

    def _override(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadows the method `name` of the one model, not of its class: other models stay as they are."""
        before = self.model.__dict__.get(name)
        original = getattr(self.model, name)

        @functools.wraps(original)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            if attachment_of(self.model) is not self:
                return original(*args, **kwargs)
            return wrapper(original, *args, **kwargs)

        self.model.__dict__[name] = shadow
        self._overridden[name] = (shadow, before)

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is not None and scope.owner is self and scope.generating:
            return original(*args, **kwargs)
        with entered(opened(self)):
            return original(*args, **kwargs)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with entered(opened(self, generating=True)):
            return original(*args, **kwargs)

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is None or scope.owner is not self or id(self) in scope.disabled:
            return original(*args, **kwargs)
        result, tokens = spliced(original, *args, **kwargs)
        if tokens is not None:
            scope.tokens = tokens
        return result


def attach(model: PreTrainedModel, mode: Mode | str, **settings: Any) -> Attachment:
    """Puts a freshly initialised adapter on `model`; it changes nothing until it is trained.

    Args:
        model: a causal language model of transformers, or a LLaVA.
        mode: a mode with its settings (`MoReS(rank=4)`), or a registered name with the settings as keywords.

    Raises:
        ArgumentsError: unknown mode or settings that do not fit; all problems in one message.
        SteeringError: the model carries an adapter already, or no decoder is found in it.
    """
    if isinstance(mode, str):
        mode = registry.get(mode)(**settings)
    elif settings:
        raise ArgumentsError(f"settings go into the mode itself here: {type(mode).__name__}({', '.join(settings)}=...)")
    if attachment_of(model) is not None:
        raise SteeringError("this model carries an adapter already; call llava_steering_plugin.remove(model) first.")
    return Attachment(model, mode)


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """The adapter on `model`, None without one."""
    found: Attachment | None = model.__dict__.get(ATTRIBUTE)
    return found


def remove(model: PreTrainedModel) -> None:
    """Takes the adapter off `model`. Tensors that came with it (a trained projector) stay.

    Raises:
        SteeringError: the model carries none.
    """
    required(model).remove()


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, and in this thread, `model` answers as without its adapter.

    Raises:
        SteeringError: the model carries no adapter.
    """
    owner, around = id(required(model)), current()
    tokens = around.tokens if around is not None and around.owner is None else None
    before = around.disabled if around is not None else frozenset()
    with entered(Scope(tokens=tokens, disabled=before | {owner})):
        yield


def required(model: PreTrainedModel) -> Attachment:
    """The adapter on `model`; SteeringError if it carries none."""
    found = attachment_of(model)
    if found is None:
        raise SteeringError(f"this {type(model).__name__} carries no adapter; attach() or load_adapter() puts one on.")
    return found


@torch.no_grad()
def set_parameters(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copies tensors into parameters of the same names and shapes, also into ones that ZeRO-3 has cut."""
    for name, parameter in parameters.items():
        with gathered([parameter], modify=True):
            parameter.copy_(tensors[name])
