"""Pages of `llava-steering report`, made in this process and read as a browser reads them; results to make them of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from llava_steering_plugin.cli import app

TEXTS = ("all text", "without the first token", "without the system prompt", "without both")


@dataclass
class Page:
    """What is in a page.

    Attributes:
        html: all of it.
        loads: what elements load or send to: (tag, attribute, value), but for what is in the page itself.
        tags: how often each element stands there.
        text: what readers see, but for the figures.
        figures: the data and the layout of each figure of plotly.
    """

    html: str
    loads: list[tuple[str, str, str]] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)
    text: str = ""
    figures: list[tuple[list[dict[str, Any]], dict[str, Any]]] = field(default_factory=list)

    def traces(self, title: str) -> dict[str, Any]:
        """The named traces of the first figure whose y axis has this title."""
        found = (data for data, layout in self.figures if layout["yaxis"]["title"].get("text") == title)
        return {trace["name"]: trace for trace in next(found) if "name" in trace}

    def maps(self) -> list[dict[str, Any]]:
        return [trace for data, _ in self.figures for trace in data if trace["type"] == "heatmap"]


class _Reader(HTMLParser):
    def __init__(self, page: Page):
        super().__init__()
        self.page = page
        self.open = ""
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open = tag
        self.page.tags[tag] = self.page.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster") and not (value or "").startswith(
                ("#", "data:")
            ):
                self.page.loads.append((tag, name, value or ""))

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.page.figures += _figures(data)
        elif self.open != "style":
            self.words.append(data)
        self.page.text = ""

    def close(self) -> None:
        super().close()
        self.page.text = " ".join(" ".join(self.words).split())


def _figures(script: str) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    if len(script) > 3_000_000:
        return []  # plotly itself
    found = []
    for call in re.finditer(r'Plotly\.newPlot\(\s*"figure-\d+",\s*', script):
        decoder = json.JSONDecoder()
        data, end = decoder.raw_decode(script, call.end())
        layout, _ = decoder.raw_decode(script, script.index("{", end))
        found.append((data, layout))
    return found


def read_page(file: Path) -> Page:
    page = Page(file.read_text(encoding="utf-8"))
    reader = _Reader(page)
    reader.feed(page.html)
    reader.close()
    return page


def reported(output: Path, *places: Path, words: Sequence[str] = ()) -> Page:
    """Runs `llava-steering report` in this process, raises what it raises, and reads the page."""
    result = CliRunner().invoke(app, ["report", *map(str, places), "--output", str(output), *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert result.output == f"{output}\n"
    return read_page(output)


def modality_of(models: dict[str, list[float | None]], **settings: Any) -> dict[str, Any]:
    """modality.json of models with these attention ratios by layer."""
    return {
        "settings": {"measure": "modality", "questions": "0eace8", "samples": 4, "seed": 0, **settings},
        "models": [
            {
                "name": name,
                "kind": "mores",
                "path": f"/models/{name}",
                "base": "/models/base",
                "answers": 4,
                "left_out": {"about no image": 1},
                "lmar": {text: _around(ratios) for text in TEXTS},
                "lmar_by_head": [[ratio, ratio] for ratio in ratios],
                "shares": {"image": _around([ratio and ratio / 10 for ratio in ratios])},
                "tokens": {"image": 16.0},
            }
            for name, ratios in models.items()
        ],
        "plugin_version": "0.1.0",
        "date": "2026-01-02T03:04:05+00:00",
    }


def interference_of(tasks: list[str], models: dict[str, list[list[float | None]]]) -> dict[str, Any]:
    """interference.json of models with these matrices, the same for all parameters."""

    def kinds(matrix: list[list[float | None]]) -> dict[str, Any]:
        return dict.fromkeys(("mean_of_ratios", "ratio_of_means", "ratio_of_means_shared"), matrix)

    return {
        "settings": {"measure": "interference", "data": [[None, "2d5a"]], "samples": 2, "seed": 0},
        "tasks": tasks,
        "models": [
            {
                "name": name,
                "kind": "mixlora",
                "path": f"/models/{name}",
                "base": "/models/base",
                "conversation": "v1",
                "samples": [2] * len(tasks),
                "groups": {group: kinds(matrix) for group in ("0 q_proj A", "1 q_proj A", "0 q_proj B", "all")},
                "sides": {side: kinds(matrix) for side in ("A", "B", "all")},
            }
            for name, matrix in models.items()
        ],
    }


def write_result(file: Path, document: Any) -> Path:
    """Write a result, and return its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return file.parent


def _around(values: Sequence[float | None]) -> dict[str, list[float | None]]:
    return {
        "mean": list(values),
        "low": [value and value * 0.9 for value in values],
        "high": [value and value * 1.1 for value in values],
    }
