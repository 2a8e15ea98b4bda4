"""Builds an adapter for a pool, and refuses one that cannot share a model with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fit.base_model import projector_of
from llava_steering_plugin.adapters.fit.compatibility import named_for, prepare
from llava_steering_plugin.adapters.parts.added_tokens import knows_tokens
from llava_steering_plugin.adapters.parts.image_settings import differing_settings
from llava_steering_plugin.adapters.stored.folder import EXTRA, StoredAdapter
from llava_steering_plugin.errors import AdapterError, listing, shortened
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.modes.base import DecoderShape
from llava_steering_plugin.modes.joint import at_decode, reads_padding
from llava_steering_plugin.pool.adapter import PooledAdapter
from llava_steering_plugin.pool.image_features import maker_of
from llava_steering_plugin.pool.projectors import own_projector

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pooled(
    name: str, stored: StoredAdapter, model: PreTrainedModel, shape: DecoderShape, tokenizer: Any
) -> PooledAdapter:
    """Build an adapter's modules, and its own projector, in CPU memory; the model stays as it is.

    Raises:
        AdapterError: of another kind, with tensors that do not fit, or one that cannot share a model with others; all
            problems at once.
        BaseMismatch: `model` is not the base that the adapter was trained on.
    """
    stored = named_for(model, stored)
    mode, modules = prepare(model, shape, stored)
    extras = _different(model, stored.section(EXTRA))
    found = projector_of(model)
    prefix = f"{found[0]}." if found is not None else None
    problems = _needs_of_its_own(model, stored, tokenizer)
    newline = extras.pop(family_of(model).newline() or "", None)
    others = [key for key in extras if prefix is None or not key.startswith(prefix)]
    problems += shortened([f"it brings its own {key}" for key in others])
    brought = newline is not None or len(others) < len(extras)
    if brought and not family_of(model).splices and maker_of(model) is None:
        problems.append("it brings its own projector, and this model has no get_image_features to give it its images")
    if problems:
        raise AdapterError(
            listing(
                f"the adapter in {stored.path} cannot share a model with others. Serve it alone, for example "
                f"`python -m llava.serve.model_worker --model-path {stored.path}`",
                problems,
            )
        )
    for module in modules.values():
        module.eval().requires_grad_(False)
    projector = None
    if found is not None and prefix is not None and extras:
        own = {key.removeprefix(prefix): tensor for key, tensor in extras.items()}
        projector = own_projector(found[1], own, model.dtype).cpu()
    called = at_decode(mode, modules)
    return PooledAdapter(
        name, stored.config, stored.path, mode.full_name, modules, projector, called, newline, reads_padding(mode)
    )


def _different(model: PreTrainedModel, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of an adapter's own tensors for the model that differ from the model's."""
    return {
        name: tensor
        for name, tensor in extras.items()
        if (here := model.get_parameter(name)).shape != tensor.shape
        or not torch.equal(here.detach().cpu(), tensor.to(here.dtype))
    }


def _needs_of_its_own(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> list[str]:
    """List what the adapter needs of a model beside modules and projector, and this one does not have."""
    problems = []
    tokens = stored.config.added_tokens
    if tokens and not knows_tokens(model, stored, tokenizer):
        problems.append(f"it adds to the vocabulary: {', '.join(tokens)}")
    return problems + differing_settings(model, stored)
