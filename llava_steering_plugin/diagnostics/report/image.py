"""The section on one image, from image.json: attention of words, effects on the answer and updates of MoReS over it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.pictures.overlays import WORDS, scales_of
from llava_steering_plugin.diagnostics.report.maps import SHARES, SIGNED, draw_overlay
from llava_steering_plugin.diagnostics.report.parts import (
    Figure,
    Run,
    Section,
    Table,
    matrix,
    models_table,
    number,
    settings_table,
    short_names,
    shown,
    written,
)

PICTURES = ("data:image/jpeg;base64,", "data:image/png;base64,")
EFFECTS = {
    "occlusion": "The log-probability that the answer loses when a part is hidden. Purple: the answer needs it; "
    "orange: it speaks against it.",
    "gradients": "Integrated gradients of the answer's log-probability. Purple: for the answer; orange: against it.",
}


def image_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of image.json: maps over the image, those of one run and kind on one scale.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    return Section(
        title="Where on the image",
        source="Where a model looks while it answers, which parts the answer depends on, and where MoReS moves hidden "
        "states; docs/diagnostics.md, section Where on the image.",
        findings=[_finding(run, model) for run in runs for model in run.document["models"]],
        limits=[
            "Attention need not explain an answer (arXiv 1902.10186); that is why the effect stands beside it.",
            "Effects explain the answer that is measured, right or wrong: two answers are two questions.",
            "It is one image: do not conclude from it how the model is in general.",
        ],
        settings=[
            models_table(runs, {"answer": "answer", "conversation": "conversation", "tokens": "tokens"}),
            settings_table(runs),
        ],
        figures=[figure for run in runs for figure in _figures(run, several=len(runs) > 1)],
        tables=[_words_table(run) for run in runs],
    )


def _finding(run: Run, model: Mapping[str, Any]) -> str:
    """Say what one model answered, and how much of its attention was on the image."""
    settings = run.document["settings"]
    words = "; ".join(f"{word['text']}: {written(number(word['on_image']))}" for word in model["words"][:WORDS])
    certainty = number(model["log_probability"])
    probability = "" if certainty is None else f" (probability {written(math.exp(certainty))})"
    return (
        f'Asked "{settings["question"]}" about {run.document["image"]["file"]}, {model["name"]} answers '
        f'"{model["answer"]}"{probability}. The share of a word\'s attention that is on the image: {words or "none"}.'
    )


def _figures(run: Run, *, several: bool) -> Iterator[Figure]:
    """Yield the image, and all maps of a run."""
    picture = run.document["image"]
    if not str(picture["thumbnail"]).startswith(PICTURES):
        raise ValueError("its thumbnail is no JPEG or PNG in the file itself")
    models = run.document["models"]
    scales = scales_of(models)
    behind = f" ({run.label})" if several else ""
    boxes = [model["grid"]["box"] for model in models]
    yield Figure(f"The image{behind}", shown(picture["file"]), draw_overlay(picture, boxes))
    for name, model in zip(short_names([str(model["name"]) for model in models]), models, strict=True):
        sinks = [(int(row), int(column)) for row, column in model["sinks"]]
        crossed = " Sinks are crossed out." if sinks else ""
        for word in model["words"][:WORDS]:
            drawing = draw_overlay(
                picture,
                boxes,
                matrix(word["attention"]),
                box=model["grid"]["box"],
                scale=(0, scales["attention"]),
                colours=SHARES,
                marked=sinks,
            )
            words = f"The share of the word's attention that goes to each patch.{crossed}"
            yield Figure(f"{name}: attention of {word['text']!r}{behind}", words, drawing)
        for kind, title in (("effect", "effect on the answer"), ("update", "size of the update")):
            part = model[kind]
            if "values" not in part:
                continue
            end = scales[kind]
            drawing = draw_overlay(
                picture,
                boxes,
                matrix(part["values"]),
                box=model["grid"]["box"],
                scale=(-end if kind == "effect" else 0, end),
                colours=SIGNED if kind == "effect" else SHARES,
            )
            words = "The size of MoReS' update relative to the hidden state, the mean over layers."
            if kind == "effect":
                words = EFFECTS.get(str(part["kind"]), "The effect of each patch on the answer.")
            yield Figure(f"{name}: {title}{behind}", words, drawing)


def _words_table(run: Run) -> Table:
    rows = [
        [str(model["name"]), str(word["text"]), shown(word["tokens"]), written(number(word["on_image"]))]
        for model in run.document["models"]
        for word in model["words"]
    ]
    heads = ["model", "word", "tokens", "attention on the image"]
    return Table(f"Words of the answers about {run.document['image']['file']}", heads, rows)
