"""Measure what a model does with the patches of one image: how much it attends to each, and how far MoReS moves each.

Attention is that of single queries, layer by layer (`measures.attention`). A few patches may take much of it whatever
is asked: attention sinks, which hide everything else on a colour scale (described for language models in
arXiv 2309.17453, for vision transformers in arXiv 2309.16588). `find_sinks` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.measures.attention import attention_taken, layers_of
from llava_steering_plugin.measures.steering import Norms, steerings, watched_norms
from llava_steering_plugin.modes.mores import SteeredLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A sink takes more than so many times the attention of the median patch.
SINK = 5.0


def measure_attention(
    model: PreTrainedModel, forward: Callable[[], Any], queries: Tensor, keys: Tensor
) -> tuple[Tensor, Any]:
    """Measure the attention of some positions to others in one pass, averaged over the heads.

    Args:
        forward: runs the pass of `model` over one row.
        queries: bool [positions], those whose attention is wanted.
        keys: int64 [keys], the positions that it goes to.

    Returns:
        the attention, float64 [layers, queries, keys], where the sum over all positions would be 1, and what `forward`
        returned.

    Raises:
        SteeringError: the model's attention cannot be read.
    """
    parts: list[list[Tensor]] = [[] for _ in range(layers_of(model))]

    def take(layer: int, row: int, weights: Tensor) -> None:
        parts[layer].append(weights[:, :, keys.to(weights.device)].mean(0).double().cpu())

    with attention_taken(model, queries[None], take):
        result = forward()
    return torch.stack([torch.cat(layer) for layer in parts]), result


def find_sinks(answer: Tensor, question: Tensor) -> Tensor:
    """Find the patches that take attention whatever is read: more than `SINK` times the median patch's.

    For every word of the answer, and in the median over the words of the question, so that a patch which an answer of
    one word rightly looks at is not taken for a sink.

    Args:
        answer: float [words, patches], averaged over heads and layers.
        question: float [tokens, patches], of the text between image and answer; it may have no rows.

    Returns:
        bool [patches].
    """
    found = (answer > SINK * answer.median(1, keepdim=True).values).all(0)
    if len(question):
        found &= ((question / question.median(1, keepdim=True).values).nan_to_num(0.0)).median(0).values > SINK
    return found


class Updates:
    """Holds the relative norms |R^T (M h + b)| / |h| of the visual tokens that one pass has steered.

    Attributes:
        by_layer: by the path of a steered layer, the numbers of the steered positions, int64 [tokens], and their norms,
            float64 [tokens].
    """

    def __init__(self) -> None:
        self._norms: Mapping[tuple[str, str], Norms] = {}
        self._positions: dict[str, Tensor] = {}

    @property
    def by_layer(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            path: (self._positions[path], norms.values[-1])
            for (path, _), norms in self._norms.items()
            if path in self._positions and norms.values
        }


@contextmanager
def watched_updates(modules: Mapping[str, nn.Module]) -> Iterator[Updates]:
    """Note which visual tokens of the one pass in the block are steered, and how far (MoReS, eq. 3-4).

    Args:
        modules: of an adapter, by the path of their layer. The pass has one row.
    """
    visual = {place: steering for place, steering in steerings(modules).items() if place[1] == "vis"}
    updates = Updates()
    handles = []

    def noting(path: str) -> Any:
        def note(layer: SteeredLayer, args: tuple[Any, ...]) -> None:
            output, _, this_pass = args
            updates._positions[path] = layer.chosen(this_pass, "vis", output.device).cpu()

        return note

    try:
        for path, _ in visual:
            handles.append(modules[path].register_forward_pre_hook(noting(path)))
        with watched_norms(visual) as updates._norms:
            yield updates
    finally:
        for handle in handles:
            handle.remove()
