"""Measure how MixLoRA's routers choose, and whether their choices matter.

Conditional Mixture of LoRA (arXiv 2402.15896), section 3 and its pictures of factor selection. Every linear chooses r
of E factors on each side (A and B) for each row. `watched_choices` notes the choices of a pass; `forced_choices` puts
others in their place, which answers the question that pictures of choices leave open: what is lost if they are
shuffled between samples, fixed to the most frequent ones, or random?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora import RoutedLinear
from llava_steering_plugin.modes.mixlora_routing import Choice, Routing

SIDES = ("A", "B")
# The choices of one row in all linears: int64 [r] each, by the linear's path and the side.
Choices = dict[tuple[str, str], Tensor]
# The scores that they follow from, as probabilities: float32 [E] each, by the same keys.
Scores = dict[tuple[str, str], Tensor]


def routed_linears(modules: Mapping[str, nn.Module]) -> dict[str, RoutedLinear]:
    """Return the linears of an adapter that choose, by their path; none if it is no MixLoRA."""
    return {path: module for path, module in modules.items() if isinstance(module, RoutedLinear)}


@contextmanager
def watched_choices(linears: Mapping[str, RoutedLinear], scores: list[Scores] | None = None) -> Iterator[list[Choices]]:
    """Note the choices of the forward passes in the block: one entry for each row of each pass, in order.

    Decode steps reuse the choice of their prefill and are not noted.

    Args:
        scores: gets the scores that the choices follow from, an entry for each row; None: they are not computed.
    """
    rows: list[Choices] = []
    first = next(iter(linears), None)

    def note(path: str, routing: Routing) -> None:
        count = len(routing.a.factors)
        if path == first:
            rows.extend({} for _ in range(count))
            if scores is not None:
                scores.extend({} for _ in range(count))
        for row in range(count):
            for side, choice in zip(SIDES, routing, strict=True):
                rows[len(rows) - count + row][path, side] = choice.factors[row].cpu()
                if scores is not None and choice.probability is not None:
                    scores[len(scores) - count + row][path, side] = choice.probability[row].detach().cpu()

    def watch(path: str, route: Any, hidden: Tensor, this_pass: ForwardPass) -> Routing:
        routing: Routing = route(hidden, this_pass)
        note(path, routing)
        return routing

    before = {path: module.shows_probabilities for path, module in linears.items()}
    try:
        for module in linears.values():
            module.shows_probabilities |= scores is not None
        with _routes(linears, watch):
            yield rows
    finally:
        for path, module in linears.items():
            module.shows_probabilities = before[path]


@contextmanager
def forced_choices(linears: Mapping[str, RoutedLinear], choices: Choices) -> Iterator[None]:
    """Let all rows of the passes in the block take these choices, whatever the routers say."""

    def force(path: str, route: Any, hidden: Tensor, this_pass: ForwardPass) -> Routing:
        rows = len(hidden)
        sides = (choices[path, side].to(hidden.device).expand(rows, -1) for side in SIDES)
        return Routing(*(Choice(side, None) for side in sides))

    with _routes(linears, force):
        yield


def use(rows: Sequence[Choices], place: tuple[str, str], factors: int) -> Tensor:
    """Return the share of rows that choose each factor at a linear and side, float64 [E]; the sum is r."""
    chosen = torch.stack([row[place] for row in rows]).flatten()
    return torch.bincount(chosen, minlength=factors).double() / len(rows)


def entropy(shares: Tensor) -> float:
    """Return the entropy of how often factors are chosen, from 0 (always the same) to 1 (all alike).

    Args:
        shares: float64 [E], as `use` returns them.
    """
    if len(shares) < 2:
        return 0.0
    probability = shares / shares.sum()
    return float(torch.special.entr(probability).sum() / torch.log(torch.tensor(float(len(shares)))))


def overlap(rows: Sequence[Choices], others: Sequence[Choices], place: tuple[str, str], factors: int) -> float:
    """Return how much two sets of rows, such as two tasks, choose alike: the sum of the smaller shares over r.

    1: each factor is chosen as often by both; 0: no factor is chosen by both.
    """
    one, other = use(rows, place, factors), use(others, place, factors)
    return float(torch.minimum(one, other).sum() / one.sum())


def mutual_information(rows: Sequence[Choices], tasks: Sequence[str], place: tuple[str, str]) -> float:
    """Return the adjusted mutual information of the chosen set and the task: 0 for chance, 1 if one tells the other."""
    from sklearn.metrics import adjusted_mutual_info_score

    sets = [" ".join(map(str, sorted(row[place].tolist()))) for row in rows]
    return float(adjusted_mutual_info_score(list(tasks), sets))


def multi_hot(rows: Sequence[Choices], factors: int) -> Tensor:
    """Return the choices of all linears as one vector for each row, bool [rows, linears * sides * E]."""
    table = torch.zeros(len(rows), len(rows[0]), factors, dtype=torch.bool)
    for number, row in enumerate(rows):
        for column, chosen in enumerate(row.values()):
            table[number, column, chosen] = True
    return table.flatten(1)


def most_frequent(rows: Sequence[Choices], factors: int) -> Choices:
    """Return the r factors that most rows choose, at every linear and side; of equals, those of lower number.

    They stand in the order of their mean place in the choices, since the k-th factors of both sides go together. So
    routers that choose alike for all rows lose nothing.
    """
    found = {}
    for place, chosen in rows[0].items():
        order = torch.sort(use(rows, place, factors), descending=True, stable=True).indices
        kept = order[: len(chosen)].sort().values
        table = torch.stack([row[place] for row in rows])
        found[place] = kept[torch.tensor([_mean_place(table, factor) for factor in kept]).sort(stable=True).indices]
    return found


def _mean_place(table: Tensor, factor: Tensor) -> float:
    """Return the mean place of a factor in the choices [rows, r] that hold it; r if none does."""
    places = (table == factor).nonzero()[:, 1]
    return float(places.double().mean()) if len(places) else float(table.shape[1])


def cycled(count: int, generator: torch.Generator) -> list[int]:
    """Return a random order of `count` numbers in which none is at its own place: one cycle of all (Sattolo's)."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (1,), generator=generator))
        order[last], order[other] = order[other], order[last]
    return order


def at_random(places: Choices, factors: int, generator: torch.Generator) -> Choices:
    """Return r different factors for each linear and side, drawn alike for all."""
    return {place: torch.randperm(factors, generator=generator)[: len(chosen)] for place, chosen in places.items()}


@contextmanager
def _routes(linears: Mapping[str, RoutedLinear], instead: Any) -> Iterator[None]:
    """Route by `instead(path, route, hidden, this_pass)` inside the block; `route` is the linear's own."""
    try:
        for path, module in linears.items():
            module.choose = lambda hidden, this_pass, path=path, route=module.route: instead(
                path, route, hidden, this_pass
            )
        yield
    finally:
        for module in linears.values():
            module.choose = None
