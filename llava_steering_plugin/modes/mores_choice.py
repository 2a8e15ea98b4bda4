"""Learn which of several token selections each layer steers: MoReS with a dynamic steering ratio.

LLaVA Steering (arXiv 2412.12359; ACL 2025, section 5.6) lets a model choose among given ratios, and names no mechanism.
This one is ours. A layer has a score s_j for each selection S_j, and steers the tokens of the best one, k:

    h'_t = h_t + [t in S_k] u_t,    u_t = R^T (M h_t + b),    k = argmax s

A choice has no gradient. Backwards, the weight of a token is the probability that its selection is chosen:

    dL/dp_j = sum over t in S_j of  <dL/dh'_t, u_t>,    p = softmax(s)

which is, to first order, what steering the tokens of S_j with the present update adds to the loss. Nothing is drawn at
random: ranks choose alike because their scores are alike, and so does a layer that checkpointing runs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.distributed import gathered, is_partitioned
from llava_steering_plugin.modes.base import no_autocast
from llava_steering_plugin.modes.mores_frames import is_unchanged
from llava_steering_plugin.modes.mores_selection import TokenSelection


def best(scores: Tensor) -> Tensor:
    """Return the number of the largest score of [selections], int64 [1]; of equal ones the first, on any device."""
    return scores.detach().sort(descending=True, stable=True).indices[:1]


class _Chosen(torch.autograd.Function):
    """Return the updates of the chosen tokens, and zeros for the others; backwards the choice is a probability."""

    @staticmethod
    def forward(ctx: Any, updates: Tensor, probabilities: Tensor, options: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(updates, options, kept)
        return torch.where(kept, updates, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        updates, options, kept = ctx.saved_tensors
        worth = (gradient.float() * updates.float()).sum(-1)
        return torch.where(kept, gradient, 0), worth @ options.float(), None, None


class TokenChoice(nn.Module):
    """Chooses one of several selections for a layer and a modality, and keeps the updates of its tokens.

    Args:
        selections: to choose among. The first one is where a training begins.

    Shapes:
        updates: [tokens, D] in any float dtype, of the tokens that any of the selections has.
        options: bool [tokens, selections], which of the selections have a token.
    """

    def __init__(self, selections: Sequence[TokenSelection]):
        super().__init__()
        self.selections = tuple(selections)
        self.steer_scores = nn.Parameter(torch.zeros(len(self.selections), dtype=torch.float32))
        self.latest: Tensor | None = None  # the choice of the latest training pass, for the log
        self._kept: tuple[Tensor, int, int] | None = None

    def forward(self, updates: Tensor, options: Tensor) -> Tensor:
        with no_autocast(updates.device):
            scores = self.steer_scores.float()
            number = best(scores)
            if self.training:
                self.latest = number
            kept = options.index_select(1, number)
            chosen: Tensor = _Chosen.apply(updates, scores.softmax(0), options, kept)  # type: ignore[no-untyped-call]
        return chosen

    def learns(self) -> bool:
        """Say whether a pass made now may change the choice; one that does not computes only what is chosen."""
        return self.training or (torch.is_grad_enabled() and self.steer_scores.requires_grad)

    def selection(self) -> TokenSelection:
        """Return the chosen selection. It is read from the device once, until the scores change."""
        scores = self.steer_scores
        if is_partitioned(scores):
            with gathered([scores]):
                return self.selections[int(best(scores))]
        if scores.is_inference():
            return self.selections[int(best(scores))]
        if self._kept is None or not is_unchanged(scores, *self._kept[:2]):
            with torch.inference_mode(False):
                alias = scores.detach()
                self._kept = alias, alias._version, int(best(scores))
        return self.selections[self._kept[2]]

    def train(self, mode: bool = True) -> TokenChoice:
        self._kept = None  # some optimizers write through `.data`, which torch does not count as a change
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def chosen_by_layer(
    parameters: Mapping[str, Tensor], selections: Sequence[TokenSelection]
) -> dict[str, dict[str, str]]:
    """Return the chosen selection by modality and the path of the layer, from the parameters of an adapter.

    Args:
        parameters: named `<path of the layer>.choices.<modality>.steer_scores`, among others.
    """
    found: dict[str, dict[str, str]] = {}
    for name, value in parameters.items():
        path, inside, rest = name.rpartition(".choices.")
        if inside:
            found.setdefault(rest.partition(".")[0], {})[path] = selections[int(best(value))].spec
    return found


def listed(chosen: Mapping[str, str]) -> str:
    """Write choices by the path of the layer for people: `1%: layers.0, layers.3; all: layers.1, layers.2`."""
    layers: dict[str, list[str]] = {}
    for path, spec in chosen.items():
        layers.setdefault(spec, []).append(path)
    return "; ".join(f"{spec}: {', '.join(paths)}" for spec, paths in layers.items())


def count_choices(choices: Mapping[str, Sequence[TokenChoice]]) -> dict[str, float]:
    """Return how many layers have chosen each selection in the latest training pass, by a name for the log.

    Args:
        choices: of all layers, by modality.
    """
    figures = {}
    for modality, layers in choices.items():
        noted = [each.latest for each in layers if each.latest is not None]
        if noted:
            numbers = torch.cat([each.to(noted[0].device) for each in noted]).tolist()
            for number, selection in enumerate(layers[0].selections):
                figures[f"mores_{modality}_layers_at_{selection.spec}"] = float(numbers.count(number))
    return figures
