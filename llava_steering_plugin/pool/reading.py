"""Reads an adapter for a pool, and refuses what cannot share a model with others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters import folder as files
from llava_steering_plugin.adapters.attachment import set_parameters
from llava_steering_plugin.adapters.compatibility import check_tensors, mode_of
from llava_steering_plugin.adapters.fingerprint import alike, check_base
from llava_steering_plugin.adapters.folder import ADAPTER, ADDED, EXTRA, StoredAdapter
from llava_steering_plugin.errors import AdapterError, listing
from llava_steering_plugin.modes.base import DecoderShape
from llava_steering_plugin.pool.adapter import PooledAdapter
from llava_steering_plugin.pool.projectors import own_projector, projector_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Entries of LLaVA's config that say how images are cut, encoded and marked: one model does it one way for everybody.
# What upstream takes where a config lacks one.
INPUT_SETTINGS = ("image_", "mm_use_", "mm_patch_", "mm_vision_select_")
_DEFAULTS = {
    "image_aspect_ratio": "square",
    "mm_patch_merge_type": "flat",
    "mm_use_im_patch_token": True,
    "mm_vision_select_feature": "patch",
}


def read_pooled(
    model: PreTrainedModel, shape: DecoderShape, tokenizer: Any, name: str, name_or_path: str | os.PathLike[str]
) -> PooledAdapter:
    """Reads an adapter and builds its modules in CPU memory; the model stays as it is.

    Raises:
        AdapterError: not found, damaged, of another kind, with tensors that do not fit, or one that cannot share a
            model with others; all problems at once.
        BaseMismatch: `model` is not the base that the adapter was trained on.
    """
    stored = files.read(files.find(name_or_path) or name_or_path)
    check_base(model, stored)
    mode = mode_of(stored.config)
    if problems := mode.problems(shape):
        raise AdapterError(listing(f"the adapter in {stored.path} does not fit this model", problems))
    modules = mode.build(shape)
    parameters = {
        f"{path}.{key}": parameter for path, module in modules.items() for key, parameter in module.named_parameters()
    }
    check_tensors(model, parameters, stored)
    extras = _different(model, stored.section(EXTRA))
    found = projector_of(model)
    prefix = f"{found[0]}." if found is not None else None
    problems = _needs_of_its_own(model, stored, tokenizer)
    problems += [f"it brings its own {key}" for key in extras if prefix is None or not key.startswith(prefix)]
    if problems:
        raise AdapterError(
            listing(
                f"the adapter in {stored.path} cannot share a model with others. Serve it alone, for example "
                f"`python -m llava.serve.model_worker --model-path {stored.path}`",
                problems,
            )
        )
    set_parameters(parameters, stored.section(ADAPTER))
    for module in modules.values():
        module.eval().requires_grad_(False)
    projector = None
    if found is not None and prefix is not None and extras:
        own = {key.removeprefix(prefix): tensor for key, tensor in extras.items()}
        projector = own_projector(found[1], own, model.dtype).cpu()
    return PooledAdapter(name, stored.config, stored.path, modules, projector, mode.idle_at_decode)


def _different(model: PreTrainedModel, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of an adapter's own tensors for the model that are not the model's anyway."""
    return {
        name: tensor
        for name, tensor in extras.items()
        if (here := model.get_parameter(name)).shape != tensor.shape
        or not torch.equal(here.detach().cpu(), tensor.to(here.dtype))
    }


def _needs_of_its_own(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> list[str]:
    """What the adapter needs of a model beside modules and projector, and this one does not have."""
    problems = []
    tokens = stored.config.added_tokens
    if tokens and not _knows_tokens(model, stored, tokenizer):
        problems.append(f"it adds to the vocabulary: {', '.join(tokens)}")
    if hasattr(model, "prepare_inputs_labels_for_multimodal"):
        trained = files.read_llava_config(stored.path) or {}
        for key in sorted(key for key in trained if key.startswith(INPUT_SETTINGS)):
            here = getattr(model.config, key, None)
            if _plain(key, here) != _plain(key, trained[key]):
                problems.append(f"it was trained with {key} {trained[key]!r}; this model has {here!r}")
    return problems


def _plain(key: str, value: Any) -> str:
    """A setting in a form that compares: what is missing, None or False is all the same, and lists are tuples."""
    return json.dumps((_DEFAULTS.get(key) if value is None else value) or None)


def _knows_tokens(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> bool:
    """Whether the model has the adapter's own tokens already, with the same ids and rows."""
    tokens = stored.config.added_tokens
    if tokenizer is None or any(tokenizer.get_vocab().get(token) != number for token, number in tokens.items()):
        return False
    numbers = torch.tensor(list(tokens.values()))
    embeddings = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    return all(
        int(numbers.max()) < weight.shape[0]
        and alike(weight.detach()[numbers.to(weight.device)].float().cpu(), stored.tensors[ADDED + part].float())
        for part, weight in embeddings.items()
    )
