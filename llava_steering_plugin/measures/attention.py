"""Read the attention of single queries while a model runs, layer by layer, and keep none of it.

PyTorch shows every call of its functions to a `TorchFunctionMode`. So the queries and keys are those that the model
itself computed, with its rotations, caches and adapters, whatever its architecture: a fused kernel's are multiplied
again for the wanted queries alone, and where a model computes its weights in the open ("eager"), they are taken as they
are. Nothing of the size [heads, positions, positions] is made. Flash attention is none of PyTorch's functions;
`without_flash` has one of them compute it for the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    stack, shape = find_decoder(model)
    layers = [stack.get_submodule(layer.path) for layer in shape.layers]
    reader = _Reader(wanted, take)
    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(reader.entering(number)))
        handles.append(layer.register_forward_hook(reader.leaving))
    try:
        with without_flash(model), reader:
            yield
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [str(number) for number, calls in reader.calls(len(layers)).items() if not calls]:
        raise SteeringError(
            f"{type(model).__name__}: the attention of the layers {', '.join(unseen)} passes through none of PyTorch's "
            "functions. Load the model with attn_implementation='sdpa' or 'eager'."
        )


class _Reader(TorchFunctionMode):
    """Sees all calls of PyTorch's functions, and reads those that compute the attention of a decoder layer."""

    def __init__(self, wanted: Tensor, take: Take):
        super().__init__()
        self._wanted, self._take = wanted.cpu(), take
        self._layer: int | None = None
        self._calls: dict[int, int] = {}

    def calls(self, layers: int) -> Mapping[int, int]:
        """Return how often each layer's attention was read."""
        return {number: self._calls.get(number, 0) for number in range(layers)}

    def entering(self, number: int) -> Callable[..., None]:
        """Return a pre-hook for layer `number`."""

        def enter(*_: Any) -> None:
            self._layer = number

        return enter

    def leaving(self, *_: Any) -> None:
        """Note that a layer has ended: its hook."""
        self._layer = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._layer is not None:
            if function is functional.scaled_dot_product_attention:
                self._read_scores(*args, **kwargs)
            elif function in _SOFTMAX and result.dim() == 4 and result.shape[0::2] == self._wanted.shape:
                self._read_weights(result)
        return result

    def _read_scores(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Compute the weights of a fused kernel, given its arguments, for the wanted queries."""
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        for row, positions in self._chunks():
            places = positions.to(query.device)
            keys = key[row].float()
            if keys.shape[0] != query.shape[1]:  # grouped queries: several heads share a key
                keys = keys.repeat_interleave(query.shape[1] // keys.shape[0], 0)
            scores = query[row][:, places].float() @ keys.transpose(-1, -2) * scale
            if attn_mask is not None:
                mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])[row][:, places]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
            elif is_causal:
                future = torch.arange(key.shape[2], device=places.device)[None] > places[:, None]
                scores = scores.masked_fill(future, -torch.inf)
            self._take(self._now(), row, scores.softmax(-1))
        self._count()

    def _read_weights(self, weights: Tensor) -> None:
        """Take weights [rows, heads, queries, keys] that the model computed in the open."""
        for row, positions in self._chunks():
            self._take(self._now(), row, weights[row][:, positions.to(weights.device)].float())
        self._count()

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each row with some of its wanted positions."""
        for row, wanted in enumerate(self._wanted):
            for positions in wanted.nonzero().flatten().split(CHUNK):
                if len(positions):
                    yield row, positions

    def _now(self) -> int:
        assert self._layer is not None
        return self._layer

    def _count(self) -> None:
        self._calls[self._now()] = self._calls.get(self._now(), 0) + 1


def layers_of(model: PreTrainedModel) -> int:
    """Return the number of decoder layers of a model."""
    return len(find_decoder(model)[1].layers)
