"""Adds the tokens that an adapter's training added: the same tokens under the same ids, with the rows they had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fingerprint import alike
from llava_steering_plugin.adapters.folder import ADDED, StoredAdapter
from llava_steering_plugin.adapters.parameters import shape_of
from llava_steering_plugin.distributed import gathered, is_partitioned
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
    numbers = {token: trial.convert_tokens_to_ids(token) for token in added}
    if wrong := [
        f"{token} has id {numbers[token]}, trained as {number}"
        for token, number in added.items()
        if numbers[token] != number
    ]:
        raise BaseMismatch(listing("the tokenizer gives the adapter's own tokens other ids than in training", wrong))


def knows_tokens(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> bool:
    """Say whether the model has the adapter's own tokens already, with the same ids and rows."""
    tokens = stored.config.added_tokens
    if tokenizer is None or any(tokenizer.get_vocab().get(token) != number for token, number in tokens.items()):
        return False
    numbers = torch.tensor(list(tokens.values()))
    return all(
        int(numbers.max()) < layer.weight.shape[0]
        and alike(layer.weight.detach()[numbers.to(layer.weight.device)].cpu(), stored.tensors[ADDED + part])
        for part, layer in _embeddings(model).items()
    )


def add_tokens(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> None:
    """Give the model the rows of the adapter's tokens and, last of all, the tokenizer the tokens.

    Where that fails, at whatever point, both are left as they were.
    """
    added = stored.config.added_tokens
    if not added:
        return
    numbers = torch.tensor(list(added.values()))
    undo = _undo(model, numbers)
    try:
        rows = int(numbers.max()) + 1
        if shape_of(model.get_input_embeddings().weight)[0] < rows:
            model.resize_token_embeddings(rows)
        for part, layer in _embeddings(model).items():
            _set_rows(layer, numbers, stored.tensors[ADDED + part])
        if tokenizer is not None:
            tokenizer.add_tokens(list(added), special_tokens=True)
    except BaseException:
        undo()
        raise


def _embeddings(model: PreTrainedModel) -> dict[str, Any]:
    """The two layers with a row for each token, by the names that the adapter's tensors have."""
    return {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}


@torch.no_grad()
def _set_rows(layer: Any, numbers: Tensor, rows: Tensor) -> None:
    with gathered([layer.weight], modify=True):
        layer.weight[numbers.to(layer.weight.device)] = rows.to(layer.weight.device, layer.weight.dtype)


def _undo(model: PreTrainedModel, numbers: Tensor) -> Callable[[], None]:
    """Note how the vocabulary is, and return what makes it so again.

    transformers resizes by new layers in some versions and by new weights in the old layers in others.
    """
    layers = _embeddings(model)
    weights = {part: (layer.weight, layer.weight.data) for part, layer in layers.items()}
    counts = {
        part: {name: value for name, value in layer.__dict__.items() if name in ("num_embeddings", "out_features")}
        for part, layer in layers.items()
    }
    sizes = model.config.vocab_size, model.__dict__.get("vocab_size")
    known = {}
    for part, layer in layers.items():
        here = numbers[numbers < shape_of(layer.weight)[0]]
        with gathered([layer.weight]):
            known[part] = here, layer.weight.detach()[here.to(layer.weight.device)].clone()

    def undo() -> None:
        model.set_input_embeddings(layers["input"])
        model.set_output_embeddings(layers["output"])
        for part, layer in layers.items():
            layer.weight, data = weights[part]
            if not is_partitioned(layer.weight):
                layer.weight.data = data
            layer.__dict__.update(counts[part])
            _set_rows(layer, *known[part])
        model.config.vocab_size = sizes[0]
        if sizes[1] is not None:
            model.__dict__["vocab_size"] = sizes[1]

    return undo
