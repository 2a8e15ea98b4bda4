"""The contract of a tuning mode: what it is told of a model, what it builds, and what its modules see in a pass."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

# Some for modes of other packages, which import them from here.
from llava_steering_plugin.modes.precision import default_dtype as default_dtype
from llava_steering_plugin.modes.precision import has_float64 as has_float64
from llava_steering_plugin.modes.precision import largest_in as largest_in
from llava_steering_plugin.modes.precision import no_autocast as no_autocast

T = TypeVar("T")
UNBUILDABLE = (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, MemoryError)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        path: of the layer, below the decoder stack.
        linears: (in, out) features of every linear in it, by path below the decoder stack.
    """

    path: str
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class DecoderShape:
    """All that a mode may know of a model.

    Attributes:
        hidden_size: width of the residual stream.
        layers: first to last.
        stack: path of the decoder stack below the model, which the names of the model's parameters begin with.
    """

    hidden_size: int
    layers: tuple[LayerShape, ...]
    stack: str = "model"


@dataclass
class LossGradient:
    """The gradient with which the backward pass of one loss begins.

    Attributes:
        value: scalar tensor from the beginning of the backward pass on; 1 before it, and where the loss is not seen.
    """

    value: Tensor | float = 1.0

    def note(self, gradient: Tensor) -> None:
        """Keep the gradient: a hook for the loss tensor."""
        self.value = gradient


@dataclass
class ForwardPass:
    """One forward pass of the decoder stack, shared by all layers of that pass.

    Attributes:
        visual: bool [rows, positions], True where a position holds an image feature.
        text: bool [rows, positions], True where a position holds a text token (padding is in neither).
        prompt: bool [rows, positions], the visual and text tokens before the first supervised one; at inference all.
        decode: True for a decode step (one new token per row over a cache); the masks are then [rows, 1].
        kept: what the prefill leaves for decode steps; it lives as long as the generation that the pass belongs to.
        loss_gradient: what the backward pass begins with; shared with the scope of the call.
    """

    visual: Tensor
    text: Tensor
    prompt: Tensor
    decode: bool
    kept: dict[Hashable, Any]
    loss_gradient: LossGradient = field(default_factory=LossGradient, repr=False, kw_only=True)
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return `make()`, computed by the first layer that asks for `key` and shared with the layers after it."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def loss_scale(self) -> Tensor | float:
        """Return the factor on the model's loss in this pass's backward; call it inside that backward.

        Gradient accumulation divides the loss and GradScaler multiplies it. A gradient that does not come from the loss
        has to be scaled alike. The factor is measured where the backward begins. It is 1 if the training loop computes
        a loss of its own from the logits: then it cannot be measured.
        """
        return self.loss_gradient.value


# The name of the first versions, kept for modes of other packages.
Pass = ForwardPass


class StepStatistics(ABC):
    """Hold what a mode's modules gather over the passes of an optimizer step, on all ranks.

    A training leads them through it. Without a training that does, every pass stands alone.
    """

    @abstractmethod
    def begin(self, passes: int) -> None:
        """Learn how many passes make a step, over all ranks: accumulated micro-batches times ranks. Often 1."""

    @abstractmethod
    def end_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """End a step. Every rank calls it after every step.

        Args:
            add_up: returns the sum of a tensor over all ranks. Whether it is called, and the shape of the tensor, must
                not depend on what a rank has seen: the ranks would wait for each other for ever.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs between two steps, the same on every rank, as plain JSON values."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


@dataclass(frozen=True)
class Mode(ABC):
    """Parent of all tuning modes. Subclass it as a frozen dataclass; the fields are the mode's settings.

    Every field becomes a command-line flag `--<name>_<field>` (its `help` metadata is the help text) and an entry of
    `settings` in the adapter's config, so fields are str, int, float, bool or Optional of these, with defaults.
    Register the class under the entry-point group `llava_steering.modes`; the entry point's name must be `name`.
    """

    name: ClassVar[str]
    # True if the modules change nothing at decode steps: they are not called there.
    idle_at_decode: ClassVar[bool] = False
    # True if the mode builds nothing, so that there is no training without the projector's.
    projector_alone: ClassVar[bool] = False

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        """Return everything wrong with the settings, one sentence each.

        Args:
            decoder: the model that they are meant for; None while it is unknown.
        """
        return []

    @abstractmethod
    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        """Build the modules, keyed by the path of their host, a layer or linear, below the decoder stack.

        A module is called as `module(output, inputs, this_pass)`, arguments by position, with the output of its host
        ([rows, positions, features] in the host's dtype), the host's input and the `ForwardPass`, and returns what
        replaces the output. It must be the identity when freshly built, and must use all its parameters in every pass
        that is not a decode step, also on zero rows: a rank without images must give every parameter a gradient, or
        the other ranks wait for it for ever. Parameters are float32; `build` is called with float32 as torch's default
        dtype. One that is built with `requires_grad=False` is saved with the adapter and not trained.

        A training stops if a parameter has ten steps of zero gradients. Steps count in which the module that holds it
        was called on a tensor with elements, so what works on some tokens only should be a module of its own that is
        called on those tokens alone.

        `output` belongs to the module, which may write into it. A module with a false `reads_inputs` may be given None
        for its host's input: where the rows of a batch have several adapters, each would be given a copy of its own.

        A module whose host is a linear may also do the linear's backward pass, in one with its own. It says so with a
        true `takes_backward`. In passes with gradients it is then called with `weight` too, the linear's, if that is a
        plain linear that is not trained: `output` is detached, and the gradient of the result with respect to `inputs`
        has to be the whole one.

        A module with a true `takes_host` is called with its host too, as `host=`: to read weights, or to compute it on
        other inputs, by `host.forward`. A module with a method `stored_parameters` yields its parameters by the names
        that they have in files, where these are not torch's.
        """

    def begin(self, modules: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> None:
        """Give freshly built modules those first values that depend on the weights of their hosts; often none do.

        Args:
            modules: as `build` returned them.
            hosts: by the same paths.
        """
        return

    def config_for_peft(self, decoder: DecoderShape) -> dict[str, Any] | None:
        """Return PEFT's config of this adapter, if its tensors have PEFT's names below their hosts; else None.

        It is saved beside the adapter then, so that PEFT loads it too.

        Args:
            decoder: that the adapter is on.
        """
        return None

    def remarks(self, image_tokens: int) -> list[str]:
        """Return what a user should know of the settings before a training, one or two sentences each; often nothing.

        Unlike `problems`, none of it keeps the training from starting.

        Args:
            image_tokens: how many tokens the decoder gets for an image.
        """
        return []

    def unsound(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
        """Return everything that does not compute in modules that a saved adapter has filled, one sentence each.

        The values themselves are finite, in the file and in the modules. What follows from them need not be: a sum or a
        product may leave the range of `dtype`, and a matrix may have no inverse. A sentence begins with the name of the
        tensor, `<host path>.<name in the module>: `.

        Args:
            modules: as `build` returned them, filled, in CPU memory.
            dtype: that the model computes in.
        """
        return []

    def statistics(self, modules: Mapping[str, nn.Module]) -> StepStatistics | None:
        """Return what the modules gather over a step; None where every pass stands alone.

        Args:
            modules: as `build` returned them.
        """
        return None

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return figures to log beside the loss, by name, on the training passes since the last call.

        Args:
            modules: as `build` returned them.
        """
        return {}

    def learned(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """Return what a training has chosen, for the model card, from all parameters by name; often nothing."""
        return {}

    @property
    def shards(self) -> bool:
        """Say whether ZeRO-3 can train the mode: a parameter is whole there while the module that holds it runs."""
        return True

    @property
    def full_name(self) -> str:
        """Return what tables, cards and lists call the mode: its name, with the method where it has several."""
        return self.name

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)


NEVER_ABSENT: Any = object()


def setting(default: Any, help: str, *, absent: Any = NEVER_ABSENT, file: bool = False) -> Any:
    """Declare a setting of a mode: a dataclass field with a default and the help text of its flag.

    Args:
        absent: what an adapter means that was saved before the mode had this setting, and so does not name it. To be
            given for every setting that is added to a mode of which adapters exist. Without it, an adapter that does
            not name the setting is refused: a default that changes later must not change what adapters compute.
        file: the flag takes the name of a file too, whose text becomes the value.
    """
    return field(default=default, metadata={"help": help, "absent": absent, "file": file})


def meaning_of_absent(mode: type[Mode], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a saved adapter leaves out: those with a declared meaning, and the names of the others.

    Args:
        settings: of the adapter.
    """
    meant, missing = {}, []
    for each in dataclasses.fields(mode):
        if each.name not in settings:
            absent = each.metadata.get("absent", NEVER_ABSENT)
            if absent is NEVER_ABSENT:
                missing.append(each.name)
            else:
                meant[each.name] = absent
    return meant, missing


def build_modules(mode: Mode, decoder: DecoderShape) -> dict[str, nn.Module]:
    """Return the mode's modules, built with float32 as torch's default dtype, as `Mode.build` promises."""
    with default_dtype(torch.float32):
        return mode.build(decoder)
