"""Measure where MoReS steers: how strongly each layer does, in which directions, and which layers matter.

LLaVA Steering (arXiv 2412.12359), eq. 3-4: a layer adds R^T (M h + b) to a hidden state h, within the subspace that the
rows of R span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.mores import SteeredLayer, Steering


def steerings(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], Steering]:
    """Return the steerings of an adapter by the path of their layer and their modality, "vis" or "text"."""
    return {
        (path, modality): steering
        for path, layer in modules.items()
        if isinstance(layer, SteeredLayer)
        for modality, steering in layer.named_children()
        if isinstance(steering, Steering)
    }


def principal_cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two subspaces, float64 [the smaller rank], largest first.

    1: a direction that both have; 0: a direction of one that is orthogonal to the other.

    Args:
        one, other: float32 [rank, D] with orthonormal rows, as `Steering.basis` returns them.
    """
    cosines: Tensor = torch.linalg.svdvals(one.double() @ other.double().T).clamp(max=1.0)
    return cosines


def similarity(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine of the principal angles between two subspaces, from 0 to 1; 1: one holds the other.

    Args:
        one, other: as in `principal_cosines`.
    """
    return float(principal_cosines(one, other).mean())


def chance_similarity(one: int, other: int, width: int, draws: int = 20) -> float:
    """Return the mean similarity of random subspaces of these ranks in `width` dimensions, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rank: int) -> Tensor:
        rotation: Tensor = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float32)).Q.T
        return rotation

    return sum(similarity(drawn(one), drawn(other)) for _ in range(draws)) / draws


@dataclass
class Norms:
    """Holds the relative norms |R^T (M h + b)| / |h| of the steered tokens of one layer.

    Attributes:
        values: float64 [tokens] of each pass.
    """

    values: list[Tensor] = field(default_factory=list)

    def mean(self) -> float:
        """Return the mean over all tokens; NaN if none was steered."""
        return float(torch.cat(self.values).mean()) if self.values else float("nan")

    def spread(self) -> float:
        """Return the standard deviation over all tokens; NaN if none was steered."""
        return float(torch.cat(self.values).std(correction=0)) if self.values else float("nan")

    def tokens(self) -> int:
        """Return how many tokens were steered."""
        return sum(map(len, self.values))


@contextmanager
def watched_norms(found: Mapping[tuple[str, str], Steering]) -> Iterator[dict[tuple[str, str], Norms]]:
    """Note the relative norms of all updates of the forward passes in the block."""
    norms = {place: Norms() for place in found}
    handles = []

    def watching(place: tuple[str, str]) -> Any:
        def watch(steering: nn.Module, args: tuple[Tensor, ...], update: Tensor) -> None:
            hidden = args[0].detach().double()
            if len(hidden):
                norms[place].values.append((update.detach().double().norm(dim=-1) / hidden.norm(dim=-1)).cpu())

        return watch

    try:
        for place, steering in found.items():
            handles.append(steering.register_forward_hook(watching(place)))
        yield norms
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_layer(layer: nn.Module) -> Iterator[None]:
    """Switch the steering of one layer off inside the block, for all threads.

    Args:
        layer: its `SteeredLayer`.
    """
    handle = layer.register_forward_hook(lambda module, args, output: args[0])
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_layers(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Switch the steering of several layers off inside the block, for all threads."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(without_layer(layer))
        yield
