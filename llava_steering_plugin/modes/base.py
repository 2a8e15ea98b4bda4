"""The contract of a tuning mode: what it is told about a model, what it gives back, what it sees in a forward pass."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer: its path below the decoder stack, and the (in, out) features of every linear in it."""

    path: str
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class DecoderShape:
    """All that a mode may know of a model: the width of its residual stream and its layers, first to last."""

    hidden_size: int
    layers: tuple[LayerShape, ...]


@dataclass
class LossGradient:
    """The gradient that reaches the loss of one forward pass, and with which its backward pass begins.

    Attributes:
        value: scalar tensor once a backward pass has begun; 1 before, and where the loss cannot be observed.
    """

    value: Tensor | float = 1.0

    def note(self, gradient: Tensor) -> None:
        """Take down the gradient: a hook for the loss tensor."""
        self.value = gradient


@dataclass
class ForwardPass:
    """One forward pass of the decoder stack, shared by all layers of that pass.

    Attributes:
        visual: bool [rows, positions], True where a position holds an image feature.
        text: bool [rows, positions], True where a position holds a text token (padding is in neither).
        prompt: bool [rows, positions], the visual and text tokens before the first supervised one; at inference all.
        decode: True for a decode step (one new token per row over a cache); the masks are then [rows, 1].
        kept: lives as long as the generation that the pass belongs to: what the prefill leaves for decode steps.
        loss_gradient: what the backward pass of this pass's loss begins with; shared with the scope of the call.
    """

    visual: Tensor
    text: Tensor
    prompt: Tensor
    decode: bool
    kept: dict[Hashable, Any]
    loss_gradient: LossGradient = field(default_factory=LossGradient, repr=False, kw_only=True)
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns `make()`, computed by the first layer that asks for `key` and shared with the layers after it."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def loss_scale(self) -> Tensor | float:
        """What this pass's backward multiplies the model's loss with, to be asked for inside that backward.

        Gradient accumulation divides the loss and GradScaler multiplies it. Whoever adds a gradient that does not come
        from the loss has to scale it alike. It is measured where the backward starts; 1 if the training loop makes its
        loss of the logits itself, because nothing can be measured then.
        """
        return self.loss_gradient.value


# The name that modes of other packages may know it by.
Pass = ForwardPass


@dataclass(frozen=True)
class Mode(ABC):
    """A tuning mode. Subclass as a frozen dataclass; its fields are its settings.

    Every field becomes a command-line flag `--<name>_<field>` (its `help` metadata is the help text) and an entry of
    `settings` in the adapter's config, so fields are str, int, float, bool or Optional of these, with defaults.
    Register the class under the entry-point group `llava_steering.modes`; the entry point's name must be `name`.
    """

    name: ClassVar[str]
    # Whether the modules change nothing at decode steps: where many adapters share a model, they are not even called.
    idle_at_decode: ClassVar[bool] = False

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        """Everything wrong with the settings, one sentence each, also for `decoder` where it is known already."""
        return []

    @abstractmethod
    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        """Makes the trainable modules, keyed by the path below the decoder stack of the layer or linear they sit on.

        A module is called as `module(output, inputs, this_pass)`, arguments by position, with the output of its host
        ([rows, positions, features] in the host's dtype), the host's input and the `ForwardPass`, and returns what
        replaces the output. It must be the identity when freshly built, and must use all its parameters in every pass
        that is not a decode step, also on zero rows: ranks without images otherwise wait for ever for a gradient.
        Parameters are float32. One that is built with `requires_grad=False` is saved with the adapter and never
        trained.

        A module may also have a method `enter(inputs)`: in passes with gradients its host is then called on what that
        returns, the same numbers with another way back for their gradient.
        """

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Figures to log beside the loss, by name, about the training passes since it was last asked for them.

        Args:
            modules: what `build` gave.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and the help text of its flag."""
    return field(default=default, metadata={"help": help})


def no_autocast(device: torch.device) -> torch.autocast:
    """Switches autocast off: the maths of an adapter is float32 whatever the backbone runs in."""
    # The meta device, on which plans are made, has no autocast of its own, and torch refuses its name.
    return torch.autocast(device_type="cpu" if device.type == "meta" else device.type, enabled=False)
