"""Judge what `serving_requests.py` and `serving_engine.py` have measured.

Which targets are met, and which differences are noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .shared.verdicts import table_of

# What is asked of the medians: tokens a second with 16 clients and with one, and the time to the first token with more.
LEAST_GAIN, LEAST_ALONE, MOST_LATER = 3.0, 1.0, 1.0


# What is compared, by its name in the JSON.
RATIOS = {"gain": "rate", "later": "first", "processor": "processor"}


def compared(old: Sequence[Any], new: Sequence[Any]) -> dict[str, list[float]]:
    """Return the ratios of rounds, by what is compared."""
    return {title: ratios_of(old, new, name) for title, name in RATIOS.items()}


def ratios_of(old: Sequence[Any], new: Sequence[Any], name: str) -> list[float]:
    """Return what is measured in `new` over what is in `old`, of each round."""
    return [getattr(mine, name) / getattr(theirs, name) for theirs, mine in zip(old, new, strict=True)]


@dataclass(frozen=True)
class Target:
    """One target, and what was measured.

    Attributes:
        what: is asked.
        limit: of the median of the ratios.
        at_least: the median has to be as large; else as small.
        ratios: of what is judged, over what it is compared with, of each round.
        noise: the third quartile of the control's differences from 1; 0 where there is no control.
    """

    what: str
    limit: float
    at_least: bool
    ratios: list[float]
    noise: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def missed_by(self) -> float:
        """How far the median is on the wrong side of the limit; 0 or less: it is not."""
        return self.limit - self.median if self.at_least else self.median - self.limit

    @property
    def met(self) -> bool:
        """True unless the median misses the limit by more than the noise."""
        return self.missed_by <= self.noise

    @property
    def verdict(self) -> str:
        if self.missed_by <= 0:
            return "met"
        return "met within the noise" if self.met else "NOT MET"


def targets(results: Iterable[dict[str, Any]]) -> list[Target]:
    """Judge the medians of what was measured with answers of one length."""
    found = []
    for result in results:
        for clients, of in result["clients"].items():
            who = f"{result['shape']}, {clients} at once"
            if clients == 1:
                found.append(_target(f"{who}: tokens a second", of, "gain", LEAST_ALONE))
            else:
                found.append(_target(f"{who}: time to the first token", of, "later", MOST_LATER))
            if clients == 16:
                found.append(_target(f"{who}: tokens a second", of, "gain", LEAST_GAIN))
    return found


def _target(what: str, of: dict[str, Any], name: str, limit: float) -> Target:
    noise = noise_of(of["control"][name]) if of.get("control") else 0.0
    return Target(what, limit, name == "gain", of[name], noise)


def noise_of(control: Iterable[float]) -> float:
    """Return the third quartile of the differences from 1."""
    return statistics.quantiles([abs(ratio - 1) for ratio in control], n=4, method="inclusive")[2]


def table_of_targets(judged: Iterable[Target], compared: str = "with batches, of that without") -> Table:
    """Return a table with one row for each target.

    Args:
        compared: what the ratios are of; the heading of the targets' names.
    """
    columns = (compared, "asked", "median", "range of the rounds", "noise of the control", "")
    table = table_of("targets", columns)
    for target in judged:
        table.add_row(
            target.what,
            f"{'>=' if target.at_least else '<='} {target.limit:g}",
            f"{target.median:.3f}",
            f"{min(target.ratios):.3f} .. {max(target.ratios):.3f}",
            f"{target.noise:.3f}" if target.noise else "-",
            target.verdict,
        )
    return table
