"""Put a mode on a model, take it off again, and switch it off for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.adapters.counts import ParameterCounts, counted
from llava_steering_plugin.adapters.fit.base_model import projector_of
from llava_steering_plugin.adapters.parameters import parameters_of
from llava_steering_plugin.adapters.parts.original import Original
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.hooks.hosts import hang, unhang
from llava_steering_plugin.hooks.owner import ModelOwner, owner_of
from llava_steering_plugin.hooks.scope import Scope, current, without
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import ForwardPass, Mode, build_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Attachment(ModelOwner):
    """A mode's modules on one model, and everything that has to be undone to take them off.

    Args:
        modules: the modules, built for this model; None builds fresh ones.
        original: the model as it was, where more than hooks and modules is changed; None: it is as it was.

    Attributes:
        mode: the mode and its settings.
        modules: the modules, keyed by the path of their host below the decoder stack.
        extras: names of parameters of the model beside the modules that belong to the adapter: trained ones, and those
            that the base checkpoint does not hold.
        config: what training or loading knows of the adapter beside its mode; None for a fresh one.
        original: the base's own parts, with which it answers while the adapter is off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: Mode,
        modules: dict[str, nn.Module] | None = None,
        original: Original | None = None,
    ):
        super().__init__(model)
        if modules is None:
            if problems := mode.problems(self.shape):
                raise ArgumentsError(listing(f"the tuning mode {mode.name!r} does not fit this model", problems))
            modules = build_modules(mode, self.shape)
            mode.begin(modules, {path: self.stack.get_submodule(path) for path in modules})
        self.mode = mode
        self.modules = modules
        self._fixed = {name for name, parameter in self.parameters().items() if not parameter.requires_grad}
        self.extras: set[str] = set()
        self.config: AdapterConfig | None = None
        self.original = Original(model) if original is None else original
        self._projector_hook: RemovableHandle | None = None
        self._hung: list[RemovableHandle] = []
        self._methods: set[str] = set()
        try:
            self._hung = hang(self.stack, self.modules)
            if (found := projector_of(model)) is not None:
                self._projector_hook = found[1].register_forward_hook(self._project(*found))
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
        self.hand_over().put_back()

    def hand_over(self) -> Original:
        """Take the modules off alone; the model keeps its other changes until the returned object puts them back."""
        unhang(self.stack, self.modules, self._hung)
        if self._projector_hook is not None:
            self._projector_hook.remove()
        for name in self._methods:
            vars(self.model).pop(name, None)
        self.release()
        return self.original

    def give_methods(self, methods: Mapping[str, Callable[..., Any]]) -> None:
        """Give the model methods in place of its own, until the adapter is taken off."""
        vars(self.model).update(methods)
        self._methods |= methods.keys()

    def _base(self) -> PreTrainedModel | None:
        return self.original.model()

    def _enter_pass(self, scope: Scope, this_pass: ForwardPass) -> None:
        # A call that changes nothing would still take time, in every layer and for every new token.
        if not (this_pass.decode and self.mode.idle_at_decode):
            super()._enter_pass(scope, this_pass)

    @contextmanager
    def _opened(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generating: bool) -> Iterator[Scope]:
        with super()._opened(args, kwargs, generating=generating) as scope:
            if id(self) in scope.disabled:
                self.original.check_ids(args, kwargs)
            yield scope

    def _project(self, path: str, projector: nn.Module) -> Callable[..., Tensor | None]:
        """Return a forward hook for the projector: code that calls it by itself gets the base's, too."""

        def hook(host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            scope = current()
            # The base's own is a copy with the same hooks.
            if host is not projector or scope is None or id(self) not in scope.disabled:
                return None
            base = self.original.projector(path)
            return None if base is None else base(*args)

        return hook


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
    """Take the adapter, or the pool, off `model`: it is as it was before, to the bit, in its sizes and settings too.

    Raises:
        SteeringError: the model carries none.
    """
    _owner(model).remove()


@contextmanager
def disable_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Switch the adapter of `model`, or its pool of adapters, off inside the block and in this thread.

    The base answers with its own projector, vocabulary and image settings; other threads go on with the adapter.

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
