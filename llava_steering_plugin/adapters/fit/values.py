"""Checks that a model can compute with the values of a saved adapter. `folder` has found them finite in the file.

They may still overflow in the dtype in which they are used, and what is computed from them may: an adapter that does
answers NaN, or nothing, and no error says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.fit.base_model import projector_of
from llava_steering_plugin.adapters.fit.quantised import quantised_linears, unquantise
from llava_steering_plugin.adapters.parameters import parameters_of, set_parameters
from llava_steering_plugin.adapters.stored.folder import ADAPTER, ADDED, EXTRA, StoredAdapter
from llava_steering_plugin.components.image_tokens import CONNECTOR, shape_of
from llava_steering_plugin.components.named import named_connector
from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.errors import AdapterError, listing, shortened
from llava_steering_plugin.hooks.look_alike import copied
from llava_steering_plugin.modes.base import Mode, largest_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of features that a projector is tried on.
TRIED = 16
# The part of the range that embeddings and scales may take: layers multiply by them, or add to them before they
# normalise.
ENTERING = 1 / 16


def check_values(model: PreTrainedModel, mode: Mode, modules: Mapping[str, nn.Module], stored: StoredAdapter) -> None:
    """Check the values of an adapter whose tensors fit `model`, in the dtypes in which the model uses them.

    Args:
        modules: of the mode, filled with the adapter's tensors. On the meta device, what follows from them is left out.

    Raises:
        AdapterError: some overflow, or something that is computed from them does; all in one message.
    """
    check_sizes(model, modules, stored)
    problems = [ADAPTER + problem for problem in unsound(mode, modules, model.dtype)]
    _refuse(model, stored, problems + _decoder(model, stored) + _projector(model, stored))


def check_sizes(model: PreTrainedModel, modules: Mapping[str, nn.Module], stored: StoredAdapter) -> None:
    """Check that no value of an adapter overflows in the dtype in which the model uses it.

    Raises:
        AdapterError: some do; all in one message.
    """
    _refuse(model, stored, too_large(stored.tensors, _dtypes(model, modules, stored)))


def _refuse(model: PreTrainedModel, stored: StoredAdapter, problems: list[str]) -> None:
    if problems:
        raise AdapterError(
            listing(
                f"nothing can be computed with the adapter in {stored.path} in {_named(model.dtype)}, which this model "
                "computes in. Its training has diverged or it is damaged; take an earlier checkpoint",
                shortened(problems),
            )
        )


def too_large(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """List the tensors with values that are too large for the dtypes in which they are used.

    Args:
        dtypes: by the names of tensors; others are not looked at.
    """
    found = []
    for name, dtype in dtypes.items():
        tensor = tensors[name]
        if tensor.numel() and not bool(tensor.abs().amax().double() <= largest_in(dtype)):
            largest = float(tensor.abs().amax())
            found.append(
                f"{name}: its largest value, {largest:.3g} in {_named(tensor.dtype)}, is too large for {_named(dtype)}"
            )
    return found


def unsound(mode: Mode, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
    """List what does not compute in the filled modules of a mode; nothing where they hold no values."""
    if any(parameter.is_meta for parameter in parameters_of(modules).values()):
        return []
    with torch.no_grad():
        return mode.unsound(modules, dtype)


def _dtypes(model: PreTrainedModel, modules: Mapping[str, nn.Module], stored: StoredAdapter) -> dict[str, torch.dtype]:
    """Return the dtype in which each tensor of the adapter is used."""
    dtypes = {ADAPTER + name: parameter.dtype for name, parameter in parameters_of(modules).items()}
    extras = stored.section(EXTRA)
    unpacked = quantised_linears(model, extras)
    for name in extras:
        quantised = name.rpartition(".")[0] in unpacked
        dtypes[EXTRA + name] = model.dtype if quantised else model.get_parameter(name).dtype
    if stored.config.added_tokens:
        dtypes[ADDED + "input"] = model.get_input_embeddings().weight.dtype
        dtypes[ADDED + "output"] = model.get_output_embeddings().weight.dtype
    return dtypes


@torch.no_grad()
def _decoder(model: PreTrainedModel, stored: StoredAdapter) -> list[str]:
    """List parts of the decoder, its embeddings and its head, whose values fit and whose products may not."""
    found, extras = projector_of(model), stored.section(EXTRA)
    weights: list[str] = []
    others: list[str] = []
    for name in extras:
        path, _, leaf = name.rpartition(".")
        if found is not None and name.startswith(f"{found[0]}."):
            continue
        multiplies = leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear)
        (weights if multiplies else others).append(EXTRA + name)
    if stored.config.added_tokens:
        weights.append(ADDED + "output")
        others.append(ADDED + "input")
    limit, dtype = largest_in(model.dtype), _named(model.dtype)
    problems = []
    for name in weights:
        weight = stored.tensors[name]
        if weight.numel() and not float(weight.float().norm(dim=1).amax()) * math.sqrt(weight.shape[1]) <= limit:
            problems.append(f"{name}: its products with hidden states overflow {dtype}")
    for name in others:
        value = stored.tensors[name]
        if value.numel() and not float(value.abs().amax()) <= limit * ENTERING:
            problems.append(f"{name}: its largest value leaves no room for what the layers make of it in {dtype}")
    return problems


@torch.no_grad()
def _projector(model: PreTrainedModel, stored: StoredAdapter) -> list[str]:
    """Try the adapter's own projector on features of the usual size, in a copy in float32."""
    found, extras = projector_of(model), stored.section(EXTRA)
    prefix = "" if found is None else f"{found[0]}."
    own = {name.removeprefix(prefix): tensor for name, tensor in extras.items() if name.startswith(prefix)}
    if found is None or not own or any(each.is_meta or is_partitioned(each) for each in found[1].parameters()):
        return []
    projector = copied(found[1]).cpu()
    unquantise(projector, own, model.dtype)
    set_parameters({name: projector.get_parameter(name) for name in own}, own)
    linears = [part for part in projector.modules() if isinstance(part, nn.Linear)]
    if not linears or any(type(part) is not nn.Linear for part in linears):
        return []
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, *_sizes(model, linears[0]), generator=generator, dtype=torch.float32)
    with _largest(projector) as largest:
        projector.float()(features)
    limits = dict.fromkeys(largest, largest_in(model.dtype))
    limits[list(limits)[-1]] *= ENTERING
    overflowing = [f"{prefix}{name}" for name, size in largest.items() if not size <= limits[name]]
    return [
        f"{EXTRA}{name}.weight: its products with image features overflow {_named(model.dtype)}"
        for name in overflowing[:1]
    ]


def _sizes(model: Any, first: nn.Linear) -> tuple[int, int]:
    """Return how many features the projector is tried on, and their width: a component counts on all of an image."""
    if named_connector(getattr(model.config, CONNECTOR, None)) is None:
        return TRIED, first.in_features
    tokens = shape_of(model.get_vision_tower(), model.config).tokens
    return tokens.count, tokens.width


@contextmanager
def _largest(root: nn.Module) -> Iterator[dict[str, float]]:
    """Note the largest value that each linear of `root` returns in the block."""
    largest: dict[str, float] = {}

    def hook_for(name: str) -> None:
        def note(part: nn.Module, args: object, output: Tensor) -> None:
            largest[name] = float(output.abs().amax())

        handles.append(root.get_submodule(name).register_forward_hook(note))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name, part in root.named_modules():
            if isinstance(part, nn.Linear):
                hook_for(name)
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
