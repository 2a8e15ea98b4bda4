"""Time adapters in rounds with the frozen model and with the same again, the control; judge them by one limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .timing import (
    REFERENCE,
    Samples,
    excesses,
    fair_clock,
    figures,
    ratio_table,
    summarise,
    until_decided,
    with_reference,
)
from .verdicts import write_json

FROZEN, CONTROL = "frozen", "control (frozen again)"
LIMIT = 0.03


@dataclass(frozen=True)
class Effort:
    """Rounds that are added at a time, and the wall-clock seconds after which none are added to a pass."""

    rounds: int
    seconds: float


def timed(
    title: str, calls: Mapping[str, Callable[[], None]], judged: Collection[str], effort: Effort, console: Console
) -> dict[str, Any]:
    """Run rounds until every judged variant is decided, or the time is up; print the table of the pass.

    Args:
        title: of the pass.
        calls: by the names of the variants, FROZEN and CONTROL among them.
        judged: the names that the limit is for; the others are only shown.

    Returns:
        The figures of each variant, for the JSON file.
    """

    def to_judge(samples: Samples) -> dict[str, list[float]]:
        beside = with_reference(samples, FROZEN, CONTROL)
        return {name: excesses(beside, name) for name in judged}

    raw = until_decided(calls, to_judge, limit=LIMIT, rounds=effort.rounds, seconds=effort.seconds, clock=fair_clock())
    samples = with_reference(raw, FROZEN, CONTROL)
    timings, against_frozen = (summarise(samples, baseline=name) for name in (REFERENCE, FROZEN))
    console.print(ratio_table(f"{title}, {len(samples[FROZEN])} rounds", timings))
    return {
        name: {
            **figures(samples, timing),
            "over the control alone": against_frozen[name].ratio - against_frozen[CONTROL].ratio,
        }
        for name, timing in timings.items()
    }


def too_slow(where: str, times: Mapping[str, Any], judged: Collection[str], quick: bool) -> list[str]:
    """Return one sentence for each judged variant that is above the limit: its median or, if `quick`, certainly.

    Args:
        where: what the sentences begin with, such as the model's width.
        times: of each pass, what `timed` has returned.
    """
    found = []
    for title, of in times.items():
        for name in judged:
            excess, (lowest, _) = of[name]["excess"], of[name]["interval"]
            if (lowest if quick else excess) > LIMIT:
                found.append(f"{where}, {title}, {name}: {excess:.1%} over the frozen model")
    return found


def conclude(
    console: Console,
    about: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    found: Sequence[str],
    json_file: Path | None,
    *,
    also: str = "",
) -> int:
    """Print what is not met, write the JSON file, and return the exit status.

    Args:
        about: what `prepare` has returned, and the limit.
        found: a sentence for each criterion that is not met.
        also: further criteria, to name where all are met.
    """
    for failure in found:
        console.print(failure)
    judged = "nothing is certainly more than" if about["quick"] else "everything is at most"
    console.print("FAILED" if found else f"passed: {judged} {LIMIT:.0%} over the frozen model{also}")
    if json_file is not None:
        write_json(json_file, {"machine": about, "results": results, "failures": found, "passed": not found})
    return 1 if found else 0
