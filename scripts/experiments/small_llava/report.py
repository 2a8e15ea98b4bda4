"""Show what the small LLaVA learned, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"own": "the real pictures", "shuffled": "shuffled pictures"}


def markdown(results: Mapping[str, Any]) -> str:
    """Return three tables: the losses of both trainings, those of pictures that were not trained, and what is said."""
    lines = [
        f"{results['steps']} steps of {results['batch']} after {results['first_steps']} with wrong pictures, "
        f"{results['pictures']['trained']} pictures, seed {results['seed']}, {results['date']}",
        "",
        "| loss, mean over | trained with real pictures | with shuffled ones | shuffled - real | real below shuffled |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {name} ({found['steps']}) | {_cells(found)} steps |" for name, found in results["paired"].items()]
    lines.append(f"| captions with pictures that were not trained | {_cells(results['paired_held_out'])} captions |")
    lines += [
        "",
        f"| trained with | loss of {results['pictures']['held_out']} captions with pictures that were not trained "
        "| with each other's pictures | others - own | own below others |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {NAMES[name]} | {_cells(found)} |" for name, found in results["held_out"].items()]
    lines += ["", "| picture, not trained | its caption | what the model says |", "| --- | --- | --- |"]
    rows = results["held_out"]["own"]["rows"]
    lines += [f"| {row['image']} | {_cell(row['caption'])} | {_cell(row['said'])} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(found: Mapping[str, Any]) -> str:
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
    return (
        f"{found['own']:.3f} | {found['others']:.3f} | {found['difference']:.3f}{error} "
        f"| {found['smaller']} of {found['of']}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
