"""Puts a mode on a model, takes it off again, and switches it off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.adapters.counts import ParameterCounts, counted
from llava_steering_plugin.adapters.parameters import parameters_of
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.hooks.hosts import hang, unhang
from llava_steering_plugin.hooks.owner import ModelOwner, owner_of
from llava_steering_plugin.hooks.scope import without
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import Mode, build_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Attachment(ModelOwner):
    """A mode's modules on one model, and everything that has to be undone to take them off.

    Args:
        modules: the modules, built for this model; None builds fresh ones.

    Attributes:
        mode: the mode and its settings.
        modules: the modules, keyed by the path of their host below the decoder stack.
        extras: names of parameters of the model beside the modules that belong to the adapter: trained ones, and those
            that the base checkpoint does not hold.
        config: what training or loading knows of the adapter beside its mode; None for a fresh one.
    """

    def __init__(self, model: PreTrainedModel, mode: Mode, modules: dict[str, nn.Module] | None = None):
        super().__init__(model)
        if modules is None:
            if problems := mode.problems(self.shape):
                raise ArgumentsError(listing(f"the tuning mode {mode.name!r} does not fit this model", problems))
            modules = build_modules(mode, self.shape)
        self.mode = mode
        self.modules = modules
        self._fixed = {name for name, parameter in self.parameters().items() if not parameter.requires_grad}
        self.extras: set[str] = set()
        self.config: AdapterConfig | None = None
        self._hung: list[RemovableHandle] = []
        try:
            self._hung = hang(self.stack, self.modules)
            self.take()
        except BaseException:
            self.remove()
            raise

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters, named `<host path>.<name in the module>`."""
        return parameters_of(self.modules)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the mode trains: it builds the others with `requires_grad=False`."""
        return {name: parameter for name, parameter in self.parameters().items() if name not in self._fixed}

    def summary(self) -> ParameterCounts:
        """Count what is trained and what it is part of; `print` shows it in one line, as PEFT does."""
        ours = {id(parameter) for parameter in self.parameters().values()}
        others = (parameter for parameter in self.model.parameters() if id(parameter) not in ours)
        trained = sum(int(getattr(each, "ds_numel", each.numel())) for each in others if each.requires_grad)
        return counted(self.model, self.modules, self.shape, trained)

    def remove(self) -> None:
        """Take the adapter off: the model is again what it was, to the bit."""
        unhang(self.stack, self.modules, self._hung)
        self.release()


def attach(model: PreTrainedModel, mode: Mode | str, **settings: Any) -> Attachment:
    """Put a freshly initialised adapter on `model`; it changes nothing until it is trained.

    Args:
        model: a causal language model of transformers, or a LLaVA.
        mode: a mode with its settings (`MoReS(rank=4)`), or a registered name with the settings as keywords.

    Raises:
        ArgumentsError: unknown mode or settings that do not fit; all problems in one message.
        SteeringError: the model carries an adapter already, or no decoder is found in it.
    """
    if isinstance(mode, str):
        mode = registry.configured(mode, settings)
    elif settings:
        raise ArgumentsError(f"settings go into the mode itself here: {type(mode).__name__}({', '.join(settings)}=...)")
    return Attachment(model, mode)


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """Return the adapter on `model`; None without one."""
    found = owner_of(model)
    return found if isinstance(found, Attachment) else None


def remove_adapter(model: PreTrainedModel) -> None:
    """Take the adapter, or the pool, off `model`. Tensors that came with an adapter (a trained projector) stay.

    Raises:
        SteeringError: the model carries none.
    """
    _owner(model).remove()


@contextmanager
def disable_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Switch the adapter of `model`, or its pool of adapters, off inside the block and in this thread.

    Raises:
        SteeringError: the model carries no adapter.
    """
    with without(_owner(model)):
        yield


# The names of the first versions; once imported, bare verbs do not say what they act on.
remove, disabled = remove_adapter, disable_adapter


def required(model: PreTrainedModel) -> Attachment:
    """Return the adapter on `model`; SteeringError if it carries none, or a pool of them."""
    found = _owner(model)
    if not isinstance(found, Attachment):
        raise SteeringError("this model carries a pool of adapters, none of which can be trained or saved from it.")
    return found


def _owner(model: PreTrainedModel) -> ModelOwner:
    found = owner_of(model)
    if found is None:
        raise SteeringError(f"this {type(model).__name__} carries no adapter; attach() or load_adapter() puts one on.")
    return found
