"""Whether a saved adapter fits a model: all that is wrong is reported at once. Only `unquantise` changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava_steering_plugin import registry
from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.adapters.files import ADAPTER, ADDED, EXTRA, FINGERPRINT, StoredAdapter
from llava_steering_plugin.errors import AdapterError, ArgumentsError, BaseMismatch, listing
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.zero import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How many embedding rows identify a base, and how many of their columns: 4 KB that tell any two models apart.
FINGERPRINT_ROWS, FINGERPRINT_COLUMNS = 16, 64
# Training loads bfloat16 (8 bits of mantissa), serving float16.
FINGERPRINT_TOLERANCE = 1e-2


def mode_of(config: AdapterConfig) -> Mode:
    """The mode with the adapter's settings.

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


def check_base(model: PreTrainedModel, stored: StoredAdapter) -> None:
    """Compares the model with what the adapter knows of its base: dimensions, vocabulary, some embedding rows.

    Raises:
        AdapterError: the adapter does not know its base.
        BaseMismatch: `model` is another base.
    """
    base, config = stored.config.base, model.config
    here = (int(config.num_hidden_layers), int(config.hidden_size))
    problems = []
    if here != (base.num_layers, base.hidden_size):
        problems.append(
            f"it was trained on {base.num_layers} layers of width {base.hidden_size}; "
            f"this model has {here[0]} of width {here[1]}"
        )
    weight = model.get_input_embeddings().weight
    ids, rows = stored.tensors.get(FINGERPRINT + "ids"), stored.tensors.get(FINGERPRINT + "rows")
    if ids is None or rows is None or rows.dim() != 2 or len(rows) != len(ids):
        raise AdapterError(
            f"{stored.path} has no whole fingerprint of its base, so it cannot be checked; the file is damaged."
        )
    with gathered([weight]):
        if len(ids) and int(ids.max()) >= weight.shape[0]:
            problems.append(f"its base has {base.vocab_size} embedding rows; this model has {weight.shape[0]}")
        elif not problems and not alike(weight.detach()[ids.to(weight.device), : rows.shape[1]].float().cpu(), rows):
            problems.append("the embedding rows that identify the base differ: same shape, other weights")
    if problems:
        where = getattr(config, "_name_or_path", "") or type(model).__name__
        raise BaseMismatch(
            listing(
                f"the adapter in {stored.path} does not belong to {where}. Load it on {base.name_or_path} "
                "(--model-base, if it has moved)",
                problems,
            )
        )


def alike(here: Tensor, there: Tensor) -> bool:
    if here.shape != there.shape:
        return False
    floor = FINGERPRINT_TOLERANCE * float(there.abs().mean())
    return torch.allclose(here, there, rtol=FINGERPRINT_TOLERANCE, atol=floor)


def check_tensors(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], stored: StoredAdapter) -> None:
    """Compares names and shapes with those of the mode's `parameters` and of the model.

    Raises:
        AdapterError: some are missing, have no place, or have another shape; all of them in one message.
    """
    shapes = {ADAPTER + name: _shape(parameter) for name, parameter in parameters.items()}
    for name in stored.section(EXTRA):
        if (shape := _extra_shape(model, name)) is not None:
            shapes[EXTRA + name] = shape
    if added := len(stored.config.added_tokens):
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
        for part, layer in zip(("input", "output"), embeddings, strict=True):
            shapes[ADDED + part] = (added, *_shape(layer.weight)[1:])
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


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _extra_shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    """Shape of a parameter of the base; of a quantised linear's weight, what it is unpacked; None if there is none."""
    path, _, leaf = name.rpartition(".")
    try:
        host = model.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(host, nn.Linear) and leaf == "weight":
        return (host.out_features, host.in_features)
    parameter = getattr(host, leaf, None)
    return _shape(parameter) if isinstance(parameter, nn.Parameter) else None


def unquantise(root: nn.Module, tensors: Iterable[str], dtype: torch.dtype) -> None:
    """Puts plain linears below `root` where a loader has quantised ones that the adapter brings weights for.

    LLaVA's 4-bit loader quantises the projector too; the trained projector cannot be copied into packed weights.

    Args:
        tensors: names of the weights, below `root`.
        dtype: of the plain linears.
    """
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        host = root.get_submodule(path)
        if leaf != "weight" or type(host) is nn.Linear or not isinstance(host, nn.Linear):
            continue
        plain = nn.Linear(host.in_features, host.out_features, host.bias is not None, dtype=dtype)
        plain.requires_grad_(False)
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, plain.to(host.weight.device))
