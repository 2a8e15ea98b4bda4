"""Fits a saved adapter to a model, away from it. All that is wrong is reported at once; the model stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_steering_plugin.adapters.fit.fingerprint import check_base
from llava_steering_plugin.adapters.fit.projector_kind import projector_problems
from llava_steering_plugin.adapters.fit.values import check_values
from llava_steering_plugin.adapters.parameters import parameters_of, set_parameters, shape_of
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.adapters.stored.folder import ADAPTER, ADDED, EXTRA, StoredAdapter
from llava_steering_plugin.errors import AdapterError, ArgumentsError, listing, shortened
from llava_steering_plugin.foreign_files import brief, cut
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.hooks.families import family_of, placeholder_tokens
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import UNBUILDABLE, DecoderShape, Mode, build_modules, meaning_of_absent

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
        AdapterError: of another kind, with tensors that do not fit, or with values that do not compute; all mismatches
            at once.
        BaseMismatch: `model` is not the base that the adapter was trained on.
    """
    check_base(model, stored)
    return build(model, shape, stored)


def fits(model: PreTrainedModel) -> Callable[[StoredAdapter], None]:
    """Return a check for `AdapterFolder.read`: what is no match for `model` is refused before its tensors are read."""
    shape = find_decoder(model)[1]

    def check(outline: StoredAdapter) -> None:
        check_base(model, outline)
        check_shapes(model, shape, named_for(model, outline))

    return check


def named_for(model: PreTrainedModel, stored: StoredAdapter) -> StoredAdapter:
    """Return the adapter with the names that its tensors of the base have in this model, and not in LLaVA.

    Raises:
        AdapterError: two of them are one tensor of this model.
    """
    family = family_of(model)
    names = {EXTRA + name: EXTRA + family.local(name) for name in stored.section(EXTRA)}
    if all(name == local for name, local in names.items()):
        return stored
    if twice := [name for name, times in Counter(names.values()).items() if times > 1]:
        raise AdapterError(
            f"the adapter in {stored.path} holds {', '.join(shortened(twice))} of this model under two names. The file "
            "was edited by hand; copy the adapter again."
        )
    return replace(stored, tensors={names.get(name, name): value for name, value in stored.tensors.items()})


def build(model: PreTrainedModel, shape: DecoderShape, stored: StoredAdapter) -> tuple[Mode, dict[str, nn.Module]]:
    """Do what `prepare` does, on whatever base has the adapter's dimensions."""
    mode = check_shapes(model, shape, stored)
    modules = build_modules(mode, shape)
    set_parameters(parameters_of(modules), stored.section(ADAPTER))
    check_values(model, mode, modules, stored)
    return mode, modules


def check_shapes(model: PreTrainedModel, shape: DecoderShape, stored: StoredAdapter) -> Mode:
    """Compare an adapter's tensors with what its settings need, without making that: settings may ask for terabytes.

    Raises:
        AdapterError: settings or tensors do not fit; all mismatches at once.
    """
    mode = mode_of(stored.config)
    if problems := mode.problems(shape):
        raise AdapterError(listing(f"the adapter in {stored.path} does not fit this model", problems))
    try:
        with torch.device("meta"):
            parameters = parameters_of(build_modules(mode, shape))
    except UNBUILDABLE as error:  # sizes beyond all measure
        raise AdapterError(
            f"the settings of the adapter in {stored.path} describe nothing that can be built ({brief(error, 200)}). "
            "The file is damaged or was edited by hand; copy the adapter again."
        ) from error
    check_tensors(model, parameters, stored)
    return mode


def mode_of(config: AdapterConfig) -> Mode:
    """Return the mode with the adapter's settings.

    Raises:
        AdapterError: the mode is not installed, does not know these settings, or has others that the adapter lacks.
    """
    try:
        meant, missing = meaning_of_absent(registry.get(config.mode), config.settings)
        mode = registry.configured(config.mode, {**config.settings, **meant})
    except ArgumentsError as error:
        if registry.known(config.mode):
            raise AdapterError(f"the adapter is of another version of its mode, or damaged: {error}") from error
        raise AdapterError(f"the adapter needs a mode that is not installed: {error}") from error
    problems = mode.problems()
    if problems:
        raise AdapterError(listing("the adapter's settings are out of range", problems))
    if missing:
        raise AdapterError(
            f"the adapter's settings lack {', '.join(missing)}, so it is unknown what it computes. Its header was "
            "edited by hand or made by another program; copy the adapter again."
        )
    return mode


def check_tensors(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], stored: StoredAdapter) -> None:
    """Compare names and shapes with those of the mode's `parameters` and of the model.

    Raises:
        AdapterError: some are missing, have no place, or have another shape; all of them in one message.
    """
    beyond: Mapping[str, int] = {}
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
        rows = shape_of(embeddings[0].weight)[0]
        # Each token may make the vocabulary one row larger; an id far beyond would make it as large as it says.
        beyond = {token: number for token, number in stored.config.added_tokens.items() if number >= rows + added}
    kinds = (ADAPTER, EXTRA, ADDED)
    held = {name: tuple(value.shape) for name, value in stored.tensors.items() if name.startswith(kinds)}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - held.keys())]
    problems += [f"{cut(name)} has no place in this model" for name in sorted(held.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(held[name])} where the model needs {list(shapes[name])}"
        for name in sorted(shapes.keys() & held.keys())
        if held[name] != shapes[name]
    ]
    problems += [f"the token {token} has id {number}, far above the model's" for token, number in beyond.items()]
    problems += [
        f"the token {token} has id {number}, which stands for an image in this model's prompts"
        for token, number in stored.config.added_tokens.items()
        if number in placeholder_tokens(model.config)
    ]
    problems += projector_problems(model, stored)
    if problems:
        raise AdapterError(
            listing(f"the adapter in {stored.path} does not fit its own settings or this model", shortened(problems))
        )


def _extra_shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    """Return the shape of a parameter of the base, of a quantised weight unpacked; None if there is none."""
    path, _, leaf = name.rpartition(".")
    host: nn.Module = model
    for part in path.split(".") if path else []:
        inner = host._modules.get(part)  # not by getattr, which would run a property of that name
        if inner is None:
            return None
        host = inner
    if isinstance(host, nn.Linear) and leaf == "weight":
        return (host.out_features, host.in_features)
    parameter = host._parameters.get(leaf)
    return shape_of(parameter) if parameter is not None else None


def misfits(model: Any, mode: Mode) -> list[str]:
    """List what is wrong with the settings on this model and not in themselves."""
    _, shape = find_decoder(model)
    known = mode.problems()
    return [problem for problem in mode.problems(shape) if problem not in known]
