"""Fits a saved adapter to a model, away from it. All that is wrong is reported at once; the model stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.adapters.fingerprint import check_base
from llava_steering_plugin.adapters.folder import ADAPTER, ADDED, EXTRA, StoredAdapter
from llava_steering_plugin.adapters.parameters import parameters_of, set_parameters, shape_of
from llava_steering_plugin.errors import AdapterError, ArgumentsError, listing
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import DecoderShape, Mode, build_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(model: PreTrainedModel, shape: DecoderShape, stored: StoredAdapter) -> tuple[Mode, dict[str, nn.Module]]:
    """Check a saved adapter against its base and build its modules, filled, in CPU memory.

    Args:
        model: the base; nothing of it is changed.
        shape: of its decoder.

    Returns:
        The mode, and its modules by the path of their host: what is left to do is to hang them.

    Raises:
        AdapterError: of another kind, or with tensors that do not fit; all mismatches at once.
        BaseMismatch: `model` is not the base that the adapter was trained on.
    """
    check_base(model, stored)
    return build(model, shape, stored)


def build(model: PreTrainedModel, shape: DecoderShape, stored: StoredAdapter) -> tuple[Mode, dict[str, nn.Module]]:
    """Do what `prepare` does, on whatever base has the adapter's dimensions."""
    mode = mode_of(stored.config)
    if problems := mode.problems(shape):
        raise AdapterError(listing(f"the adapter in {stored.path} does not fit this model", problems))
    modules = build_modules(mode, shape)
    parameters = parameters_of(modules)
    check_tensors(model, parameters, stored)
    set_parameters(parameters, stored.section(ADAPTER))
    return mode, modules


def mode_of(config: AdapterConfig) -> Mode:
    """Return the mode with the adapter's settings.

    Raises:
        AdapterError: the mode is not installed, or does not know these settings.
    """
    try:
        mode = registry.configured(config.mode, config.settings)
    except ArgumentsError as error:
        if config.mode in registry.names():
            raise AdapterError(f"the adapter is of another version of its mode, or damaged: {error}") from error
        raise AdapterError(f"the adapter needs a mode that is not installed: {error}") from error
    problems = mode.problems()
    if problems:
        raise AdapterError(listing("the adapter's settings are out of range", problems))
    return mode


def check_tensors(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], stored: StoredAdapter) -> None:
    """Compare names and shapes with those of the mode's `parameters` and of the model.

    Raises:
        AdapterError: some are missing, have no place, or have another shape; all of them in one message.
    """
    shapes = {ADAPTER + name: shape_of(parameter) for name, parameter in parameters.items()}
    for name in stored.section(EXTRA):
        if (shape := _extra_shape(model, name)) is not None:
            shapes[EXTRA + name] = shape
    if added := len(stored.config.added_tokens):
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
        if embeddings[1] is None:
            raise AdapterError(
                f"the adapter in {stored.path} adds tokens to the vocabulary, and this {type(model).__name__} has no "
                "language-model head for them. Load it on the whole model."
            )
        for part, layer in zip(("input", "output"), embeddings, strict=True):
            shapes[ADDED + part] = (added, *shape_of(layer.weight)[1:])
    kinds = (ADAPTER, EXTRA, ADDED)
    held = {name: tuple(value.shape) for name, value in stored.tensors.items() if name.startswith(kinds)}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - held.keys())]
    problems += [f"{name} has no place in this model" for name in sorted(held.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(held[name])} where the model needs {list(shapes[name])}"
        for name in sorted(shapes.keys() & held.keys())
        if held[name] != shapes[name]
    ]
    if problems:
        raise AdapterError(
            listing(f"the adapter in {stored.path} does not fit its own settings or this model", problems)
        )


def _extra_shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    """Return the shape of a parameter of the base, of a quantised weight unpacked; None if there is none."""
    path, _, leaf = name.rpartition(".")
    try:
        host = model.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(host, nn.Linear) and leaf == "weight":
        return (host.out_features, host.in_features)
    parameter = getattr(host, leaf, None)
    return shape_of(parameter) if isinstance(parameter, nn.Parameter) else None


def misfits(model: Any, mode: Mode) -> list[str]:
    """List what is wrong with the settings on this model and not in themselves."""
    _, shape = find_decoder(model)
    known = mode.problems()
    return [problem for problem in mode.problems(shape) if problem not in known]
