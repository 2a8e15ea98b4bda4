"""Measure one sample after the other, as rows of a table of numbers that ranks can add up.

Each row belongs to one sample, and the rank that has run it fills it in; the others leave zeros. So whatever the number
of ranks, the sum over them is the same table, and what is computed from it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.measures.modality import TEXTS, Kind, answer_queries, measure_shares
from llava_steering_plugin.measures.routing import (
    SIDES,
    Choices,
    Scores,
    entropy,
    routed_linears,
    use,
    watched_choices,
)
from llava_steering_plugin.measures.steering import steerings, watched_norms

# The texts of `measures.modality.TEXTS` that a training batch tells apart.
ALL_TEXT, NO_FIRST = "all text", "without the first token"
RATIOS = (ALL_TEXT, NO_FIRST)
# Whether a sample has a ratio: in the first column of the table.
NOTHING, MEASURED, UNREADABLE = 0.0, 1.0, -1.0
Forward = Callable[[], Any]


@dataclass
class Subject:
    """Measures an adapter on its model.

    Args:
        model: that carries it.
        layers: paths of the decoder layers, below its stack.
        modules: of the adapter, by the path of their host.

    Attributes:
        unreadable: why the attention of the model cannot be read; None as far as it can.
    """

    model: Any
    layers: Sequence[str]
    modules: Mapping[str, nn.Module]
    unreadable: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.steered = steerings(self.modules)
        self.linears = routed_linears(self.modules)
        first = next(iter(self.linears.values()), None)
        self.rank, self.factors = (0, 0) if first is None else (first.mode.rank, first.mode.factors)
        self.routers = [(path, side) for path in self.linears for side in SIDES]
        # MEASURED or another; ratios [RATIOS, layers]; norms [places, (sum, tokens)]; choices [routers, r]; entropies
        self.widths = [
            1,
            len(RATIOS) * len(self.layers),
            2 * len(self.steered),
            len(self.routers) * self.rank,
            len(self.routers),
        ]

    def measure(self, forward: Forward, kinds: Tensor | None) -> Tensor:
        """Run a pass over one sample and return its row of the table, float64 [sum of widths] on the CPU.

        Args:
            forward: runs the pass.
            kinds: int64 [1, positions], as `kinds_in_training` returns them; None: unknown, so without the ratio.
        """
        scores: list[Scores] = []
        with ExitStack() as stack:
            norms = stack.enter_context(watched_norms(self.steered))
            rows = stack.enter_context(watched_choices(self.linears, scores))
            ratios = self._ratios(forward, kinds)
        summed = [
            torch.stack([values.sum(), torch.tensor(float(len(values))).double()])
            for each in norms.values()
            for values in [torch.cat([*each.values, torch.zeros(0, dtype=torch.float64)])]
        ]
        state = MEASURED if ratios is not None else NOTHING if self.unreadable is None else UNREADABLE
        parts = [
            torch.tensor([state]),
            torch.zeros(self.widths[1]) if ratios is None else ratios.flatten(),
            *summed,
            *(rows[0][place] for place in self.routers),
            torch.tensor([entropy(scores[0][place].double()) for place in self.routers]),
        ]
        return torch.cat([part.double() for part in parts])

    def _ratios(self, forward: Forward, kinds: Tensor | None) -> Tensor | None:
        """Run the pass; return the ratios of eq. 2, float64 [RATIOS, layers]; None if there are none to measure."""
        if kinds is None or self.unreadable is not None or not _has_ratio(kinds):
            forward()
            return None
        ended = False

        def noted() -> None:
            nonlocal ended
            forward()
            ended = True

        try:
            (shares,) = measure_shares(self.model, noted, kinds)
        except SteeringError as error:
            if not ended:
                raise
            self.unreadable = str(error)
            return None
        return torch.stack([shares.ratio(TEXTS[text]) for text in RATIOS])

    def summary(self, table: Tensor) -> Summary:
        """Return what the rows of all samples say together.

        Args:
            table: float64 [samples, sum of widths], of all ranks.
        """
        states, ratios, norms, chosen, entropies = table.split(self.widths, 1)
        counted = ratios[states[:, 0] == MEASURED].view(-1, len(RATIOS), len(self.layers))
        rows: list[Choices] = [
            dict(zip(self.routers, row, strict=True))
            for row in chosen.long().view(len(table), len(self.routers), self.rank)
        ]
        sums = norms.sum(0).view(-1, 2)
        return Summary(
            len(self.layers),
            None if bool((states == UNREADABLE).any()) else len(counted),
            counted.mean(0),
            {place: (self._layer(place[0]), *pair) for place, pair in zip(self.steered, sums.tolist(), strict=True)},
            {
                place: (self._layer(place[0]), use(rows, place, self.factors), mean)
                for place, mean in zip(self.routers, entropies.mean(0).tolist(), strict=True)
            },
        )

    def _layer(self, path: str) -> int:
        return next(number for number, layer in enumerate(self.layers) if f"{path}.".startswith(f"{layer}."))


def _has_ratio(kinds: Tensor) -> bool:
    """Return whether a sample has an image, text before its answer and an answer."""
    return bool((kinds == Kind.IMAGE).any() and (kinds == Kind.PROMPT).any() and answer_queries(kinds).any())


@dataclass(frozen=True)
class Summary:
    """Holds what one pass over all samples has measured.

    Attributes:
        layers: their number.
        answers: that the ratios are the mean of; None where the attention cannot be read.
        ratios: float64 [RATIOS, layers].
        norms: by path and modality, the layer, the sum of the relative norms, and the number of tokens.
        routers: by linear and side, the layer, the shares of the factors, float64 [E], and the mean entropy.
    """

    layers: int
    answers: int | None
    ratios: Tensor
    norms: Mapping[tuple[str, str], tuple[int, float, float]]
    routers: Mapping[tuple[str, str], tuple[int, Tensor, float]]

    def record(self) -> dict[str, Any]:
        """Return the numbers as they stand in diagnostics.jsonl, without step and epoch."""
        found: dict[str, Any] = {}
        if self.answers:
            found["lmar"] = {
                "answers": self.answers,
                **_with_mean(self.ratios[RATIOS.index(ALL_TEXT)].tolist()),
                "without_first_token": _rounded(self.ratios[RATIOS.index(NO_FIRST)].tolist()),
            }
        for modality in dict.fromkeys(place[1] for place in self.norms):
            here = [each for place, each in self.norms.items() if place[1] == modality]
            means = {layer: total / tokens for layer, total, tokens in here if tokens}
            tokens = max(int(tokens) for _, _, tokens in here)
            layers = _with_mean([means.get(layer) for layer in range(self.layers)])
            found.setdefault("update_norms", {})[modality] = {"tokens": tokens, **layers}
        if self.routers:
            found["routing"] = self._routing()
        return found

    def _routing(self) -> dict[str, Any]:
        linears: dict[str, dict[str, Any]] = {}
        entropies: list[list[float]] = [[] for _ in range(self.layers)]
        uses: list[list[float]] = [[] for _ in range(self.layers)]
        for (path, side), (layer, shares, undecided) in self.routers.items():
            evenness = entropy(shares)
            entropies[layer].append(undecided)
            uses[layer].append(evenness)
            linears.setdefault(path, {})[side] = {
                "router_entropy": _rounded([undecided])[0],
                "factor_use": _rounded([evenness])[0],
                "use": _rounded(shares.tolist()),
            }
        return {
            "router_entropy": _with_mean([_mean(each) for each in entropies]),
            "factor_use": _with_mean([_mean(each) for each in uses]),
            "linears": linears,
        }


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record for the trainer's log, by name: of every layer, and their mean."""
    curves = {"lmar": record.get("lmar")}
    curves |= {f"update_norm_{modality}": each for modality, each in record.get("update_norms", {}).items()}
    curves |= {name: record.get("routing", {}).get(name) for name in ("router_entropy", "factor_use")}
    found: dict[str, float] = {}
    for name, curve in curves.items():
        if curve is None:
            continue
        named = {"mean": curve["mean"]} | {f"layer_{at:02d}": value for at, value in enumerate(curve["layers"])}
        found |= {f"diagnostics/{name}/{end}": value for end, value in named.items() if value is not None}
    return found


def _with_mean(layers: Sequence[float | None]) -> dict[str, Any]:
    rounded = _rounded(layers)
    return {"mean": _rounded([_mean([value for value in rounded if value is not None])])[0], "layers": rounded}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Return the numbers with six digits; None for what is no number, which JSON has not."""
    finite = [value if value is not None and -torch.inf < value < torch.inf else None for value in values]
    return [None if value is None else float(f"{value:.6g}") for value in finite]
