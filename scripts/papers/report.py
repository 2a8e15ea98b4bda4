"""Write the papers' tables with our rows beside the published ones, and say what was not run, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.pool.pool import BASE
from papers.tables import ENTRIES, LACKING, TABLES, Published, value_of, where_to_get

NOT_RUN = "not run"


def markdown(
    tables: Sequence[str],
    models: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
    published: Sequence[Published],
    reasons: Mapping[str, str],
) -> str:
    """Return the page.

    Args:
        tables: names of the tables.
        models: in the order of their rows.
        scores: by benchmark and model.
        published: rows from elsewhere.
        reasons: why a benchmark was not run.
    """
    parts = []
    for name in tables:
        title, columns = TABLES[name]
        rows = [row for row in published if row.table == name]
        heads = [ENTRIES[task].label for task in columns]
        lines = [f"## {title}", "", f"| | {' | '.join(heads)} |", f"| --- | {' | '.join('---:' for _ in heads)} |"]
        for row in rows:
            cells = [f"{row.values[task]:g}" if task in row.values else "" for task in columns]
            lines.append(f"| {row.model} (published) | {' | '.join(cells)} |")
        for model in models:
            named = "the base" if model == BASE else model
            lines.append(f"| {named} | {' | '.join(_cell(task, model, scores) for task in columns)} |")
        lines += ["", *(f"- {model}: {source}" for model, source in _sources(rows))]
        if not rows:
            lines.append("- The published figures of this table are not in figures.json: give them by `--figures`.")
        lines += [f"- {ENTRIES[task].label}: {ENTRIES[task].remark}." for task in columns if ENTRIES[task].remark]
        parts.append("\n".join(lines).rstrip())
    notes = [f"- {ENTRIES[task].label} (`{task}`): {reason}" for task, reason in reasons.items()]
    notes += [f"- {label}: {reason}." for label, reason in LACKING.items()]
    return "\n\n".join([*parts, "\n".join(["## Not run", "", *notes])]) + "\n"


def missing(task: str, folder: str) -> str:
    """Say what to get, and where it should go, for a benchmark whose data is not there."""
    return f"no {folder}. Get it from {where_to_get(task)}."


def _sources(rows: Sequence[Published]) -> list[tuple[str, str]]:
    by_source: dict[str, list[str]] = {}
    for row in rows:
        checked = f"checked {row.checked}" if row.checked else "not checked"
        by_source.setdefault(f"{row.source} ({checked})", []).append(row.model)
    return [("; ".join(models), source) for source, models in by_source.items()]


def _cell(task: str, model: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    found = scores.get(task, {}).get(model)
    if found is None:
        return NOT_RUN
    if ENTRIES[task].metric is None:
        return "a judge's"
    value = value_of(task, found)
    text = "undefined" if value is None else f"{value:.1f}"
    return f"{text} ({found['answers']:,} of {found['answers'] + found['missing']:,})" if found["missing"] else text
