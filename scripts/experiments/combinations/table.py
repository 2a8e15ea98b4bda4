"""Make the Markdown table of all combinations: a row for tower and connector, a column for a language model."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.combinations.cells import CONNECTORS, LANGUAGE_MODELS, METHODS, NEWER, TOWERS, Cell
from experiments.combinations.outcomes import OK, REFUSED, Outcome
from experiments.combinations.parts import connector_flag

NOT_RUN = "not run"


def markdown(outcomes: Mapping[Cell, Outcome]) -> str:
    """Return the table, and below it the reasons by their numbers.

    A cell stands for all tuning methods; where they differ, or not all were run, it has a word for each. Language
    models that are refused everywhere for one reason have a line in place of a column.
    """
    reasons: dict[str, int] = {}
    tried = {cell.language_model for cell in outcomes}
    models = [name for name in (*LANGUAGE_MODELS, *NEWER) if name in tried]
    columns = [name for name in models if _refused_everywhere(name, outcomes) is None]
    lines = [
        f"| tower | connector | {' | '.join(columns)} |",
        f"| --- | --- |{' --- |' * len(columns)}",
    ]
    for tower in TOWERS:
        for connector in CONNECTORS:
            row = [_summary(name, tower, connector, outcomes, reasons) for name in columns]
            if any(each != NOT_RUN for each in row):
                written = connector_flag(Cell("", tower, connector, ""))
                lines.append(f"| `{tower}` | `{written}` | {' | '.join(row)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    notes += [
        f"- `{name}` is refused with every tower and connector: {reason}"
        for name in models
        if (reason := _refused_everywhere(name, outcomes)) is not None
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def _summary(name: str, tower: str, connector: str, outcomes: Mapping[Cell, Outcome], reasons: dict[str, int]) -> str:
    """Return the text of a cell; its reasons get numbers."""
    words = {}
    for method in METHODS:
        outcome = outcomes.get(Cell(name, tower, connector, method))
        if outcome is None:
            continue
        if outcome.result == OK:
            words[method] = OK
        else:
            reason = short(outcome.reason)
            words[method] = f"{outcome.result} ({reasons.setdefault(reason, len(reasons) + 1)})"
    if not words:
        return NOT_RUN
    if len(words) == len(METHODS) and len(set(words.values())) == 1:
        return words[METHODS[0]]
    return ", ".join(f"{method} {word}" for method, word in words.items())


def _refused_everywhere(name: str, outcomes: Mapping[Cell, Outcome]) -> str | None:
    """Return the reason for which a language model was refused in every combination that was run; None: it was not."""
    of_model = [outcome for cell, outcome in outcomes.items() if cell.language_model == name]
    found = {(outcome.result, short(outcome.reason)) for outcome in of_model}
    if len(found) != 1:
        return None
    ((result, reason),) = found
    return reason if result == REFUSED else None


def short(reason: str) -> str:
    """Return the first problem of a message, in one line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return (listed or lines or ["no reason was given"])[0]
