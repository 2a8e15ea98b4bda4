"""Adds the tokens that an adapter's training added: the same tokens under the same ids, with the rows they had."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fit.fingerprint import alike
from llava_steering_plugin.adapters.parameters import shape_of
from llava_steering_plugin.adapters.stored.folder import ADDED, StoredAdapter
from llava_steering_plugin.distributed import gathered
from llava_steering_plugin.errors import BaseMismatch, listing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_tokens(stored: StoredAdapter, tokenizer: Any) -> None:
    """Try the adapter's tokens out on a copy of the tokenizer.

    Raises:
        BaseMismatch: they get other ids there than in training.
    """
    added = stored.config.added_tokens
    if not added or tokenizer is None:
        return
    trial = copy.deepcopy(tokenizer)
    trial.add_tokens(list(added), special_tokens=True)
    ids = {token: trial.convert_tokens_to_ids(token) for token in added}
    if wrong := [
        f"{token} has id {ids[token]}, trained as {number}" for token, number in added.items() if ids[token] != number
    ]:
        raise BaseMismatch(listing("the tokenizer gives the adapter's own tokens other ids than in training", wrong))


def knows_tokens(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> bool:
    """Tell whether the model has the adapter's own tokens already, with the same ids and rows."""
    tokens = stored.config.added_tokens
    if tokenizer is None or any(tokenizer.get_vocab().get(token) != number for token, number in tokens.items()):
        return False
    ids = token_ids(stored)
    return all(
        int(ids.max()) < layer.weight.shape[0]
        and alike(layer.weight.detach()[ids.to(layer.weight.device)].cpu(), stored.tensors[ADDED + part])
        for part, layer in embeddings(model).items()
    )


def add_tokens(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> None:
    """Give the model the rows of the adapter's tokens and, last of all, the tokenizer the tokens."""
    if not stored.config.added_tokens:
        return
    ids = token_ids(stored)
    rows = int(ids.max()) + 1
    if shape_of(model.get_input_embeddings().weight)[0] < rows:
        model.resize_token_embeddings(rows)
    for part, layer in embeddings(model).items():
        set_rows(layer, ids, stored.tensors[ADDED + part])
    if tokenizer is not None:
        tokenizer.add_tokens(list(stored.config.added_tokens), special_tokens=True)


def token_ids(stored: StoredAdapter) -> Tensor:
    """Return the ids of the adapter's own tokens, in the order of their rows."""
    return torch.tensor(list(stored.config.added_tokens.values()), dtype=torch.long)


def embeddings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the two layers with a row for each token, by the names that the adapter's tensors have."""
    return {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}


@torch.no_grad()
def set_rows(layer: Any, ids: Tensor, rows: Tensor) -> None:
    """Set the rows of an embedding or a head, also of one that ZeRO-3 has cut."""
    with gathered([layer.weight], modify=True):
        layer.weight[ids.to(layer.weight.device)] = rows.to(layer.weight.device, layer.weight.dtype)
