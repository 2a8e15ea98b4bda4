"""Read the attention of single queries while a model runs, layer by layer, and keep none of it.

PyTorch shows every call of its functions to a `TorchFunctionMode`. So the queries and keys are those that the model
itself computed, with its rotations, caches and adapters, whatever its architecture: a fused kernel's are multiplied
again for the wanted queries alone, and where a model computes its weights in the open ("eager"), they are taken as they
are. Nothing of the size [heads, positions, positions] is made. Flash attention is none of PyTorch's functions;
`without_flash` has one of them compute it for the pass.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.measures.flash import without_flash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Called with the number of the layer, the number of the row, and float32 weights [heads, wanted queries, keys].
Take = Callable[[int, int, Tensor], None]
# Called with the number of the layer and float32 weights [rows, heads, keys].
TakeLast = Callable[[int, Tensor], None]
_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
# So many queries at a time: the weights of a long answer are larger than its keys.
CHUNK = 64


@contextmanager
def attention_taken(model: PreTrainedModel, wanted: Tensor, take: Take) -> Iterator[None]:
    """Hand `take` the attention weights of the wanted queries of the forward pass in the block, layer by layer.

    Each row's queries come in order, up to `CHUNK` of them in one call.

    Args:
        model: a causal model of transformers; adapters on it work as they do otherwise.
        wanted: bool [rows, queries], the positions of the pass whose attention is wanted.
        take: gets the layer's number, the row's number, and the weights, float32 [heads, queries, keys], each query's
            with sum 1 over the keys that it may see.

    Raises:
        SteeringError: a layer's attention went through none of PyTorch's functions.
    """
    with _reading(model, _WantedQueries(wanted, take)):
        yield


@contextmanager
def last_attention_taken(model: PreTrainedModel, take: TakeLast) -> Iterator[None]:
    """Hand `take` the attention weights of the last query of every forward pass in the block, layer by layer.

    While a model generates, that is the position which predicts the next token.

    Args:
        model: a causal model of transformers; adapters on it work as they do otherwise. Padding is on the left.
        take: gets the layer's number and the weights, float32 [rows, heads, keys], with sum 1 over the keys.

    Raises:
        SteeringError: a layer's attention went through none of PyTorch's functions.
    """
    with _reading(model, _LastQuery(take)):
        yield


@contextmanager
def _reading(model: PreTrainedModel, reader: _Reader) -> Iterator[None]:
    stack, shape = find_decoder(model)
    layers = [stack.get_submodule(layer.path) for layer in shape.layers]
    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(reader.entering(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(reader.leaving))
    try:
        with without_flash(model), reader:
            yield
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [str(number) for number in range(len(layers)) if number not in reader.seen]:
        raise SteeringError(
            f"{type(model).__name__}: the attention of the layers {', '.join(unseen)} passes through none of PyTorch's "
            "functions. Load the model with attn_implementation='sdpa' or 'eager'."
        )


class _Reader(TorchFunctionMode, ABC):
    """Sees all calls of PyTorch's functions, and reads those that compute the attention of a decoder layer.

    Args:
        shape: numbers of rows and queries of the pass.

    Attributes:
        seen: the layers whose attention was read.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self.seen: set[int] = set()
        self._layer: int | None = None

    def entering(self, number: int) -> Callable[..., None]:
        """Return a pre-hook for layer `number`."""

        def enter(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._layer = number
            self._enter(args[0] if args else kwargs["hidden_states"])

        return enter

    def leaving(self, *_: Any) -> None:
        """Note that a layer has ended: its hook."""
        self._layer = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._layer is not None:
            if function is functional.scaled_dot_product_attention:
                self._read_scores(self._layer, _Fused.of(*args, **kwargs).unpacked(self._shape[1]))
                self.seen.add(self._layer)
            elif function in _SOFTMAX and result.dim() == 4 and result.shape[0::2] == self._shape:
                self._read_weights(self._layer, result)
                self.seen.add(self._layer)
        return result

    def _enter(self, hidden: Tensor) -> None:
        """Get the hidden states [rows, queries, features] that a layer begins with."""

    @abstractmethod
    def _read_scores(self, layer: int, call: _Fused) -> None:
        """Take weights that a fused kernel computes and does not show."""

    @abstractmethod
    def _read_weights(self, layer: int, weights: Tensor) -> None:
        """Take weights [rows, heads, queries, keys] that the model computed in the open."""


class _WantedQueries(_Reader):
    """Takes some queries of one pass, row by row."""

    def __init__(self, wanted: Tensor, take: Take):
        super().__init__(wanted.shape)
        self._wanted, self._take = wanted.cpu(), take

    def _read_scores(self, layer: int, call: _Fused) -> None:
        for row, positions in self._chunks():
            (weights,) = call.weights(slice(row, row + 1), positions.to(call.query.device))
            self._take(layer, row, weights)

    def _read_weights(self, layer: int, weights: Tensor) -> None:
        for row, positions in self._chunks():
            self._take(layer, row, weights[row][:, positions.to(weights.device)].float())

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each row with some of its wanted positions."""
        for row, wanted in enumerate(self._wanted):
            for positions in wanted.nonzero().flatten().split(CHUNK):
                if len(positions):
                    yield row, positions


class _LastQuery(_Reader):
    """Takes the last query of every pass, of all rows at once."""

    def __init__(self, take: TakeLast):
        super().__init__(torch.Size())
        self._take = take

    def _enter(self, hidden: Tensor) -> None:
        self._shape = hidden.shape[:2]

    def _read_scores(self, layer: int, call: _Fused) -> None:
        last = torch.tensor([call.query.shape[2] - 1], device=call.query.device)
        self._take(layer, call.weights(slice(None), last)[:, :, 0])

    def _read_weights(self, layer: int, weights: Tensor) -> None:
        self._take(layer, weights[:, :, -1].float())


@dataclass(frozen=True)
class _Fused:
    """Holds the arguments of a call of `scaled_dot_product_attention` that decide its weights.

    Attributes:
        query: [rows, heads, queries, features].
        key: [rows, key heads, keys, features].
        mask: what is added to the scores, or which are seen, for each row, head, query and key; None: all are seen.
        causal: a query sees no key after its own position.
        scale: of the scores.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> _Fused:
        """Read the arguments of a call."""
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return cls(query, key, attn_mask, is_causal, scale)

    def unpacked(self, positions: int) -> _Fused:
        """Return the call with each head by itself.

        transformers 5 packs the heads that share a key into queries of one head, where a pass has a single position.
        """
        heads = self.query.shape[2]
        if positions != 1 or heads == 1:
            return self
        query, mask = self.query.flatten(1, 2).unsqueeze(2), self.mask
        return replace(self, query=query, mask=None if mask is None else mask.flatten(1, 2).unsqueeze(2))

    def weights(self, rows: slice, places: Tensor) -> Tensor:
        """Compute the weights of the queries at some places, float32 [rows, heads, places, keys]."""
        keys = self.key[rows].float()
        if keys.shape[1] != self.query.shape[1]:  # grouped queries: several heads share a key
            keys = keys.repeat_interleave(self.query.shape[1] // keys.shape[1], 1)
        scores = self.query[rows][:, :, places].float() @ keys.transpose(-1, -2) * self.scale
        if self.mask is not None:
            mask = self.mask[rows][:, :, places]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        elif self.causal:
            future = torch.arange(keys.shape[2], device=places.device)[None] > places[:, None]
            scores = scores.masked_fill(future, -torch.inf)
        return scores.softmax(-1)


def layers_of(model: PreTrainedModel) -> int:
    """Return the number of decoder layers of a model."""
    return len(find_decoder(model)[1].layers)
