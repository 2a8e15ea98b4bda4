"""Draw maps over an image: attention of words, effects on the answer, updates of MoReS; from their JSON alone."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from llava_steering_plugin.figures import new_figure, save_figure

# Words that are drawn; the JSON holds all.
WORDS = 5
# Maps that colour-blind readers can tell apart: from dark to light, and from orange (negative) to purple.
SHARES, SIGNED = "viridis", "PuOr"
OPACITY = 0.75
PANEL = 1.9  # inches
TITLES = {"effect": "effect\non the answer", "update": "MoReS' update\nmean of layers"}
ATTENTION = "share of a word's attention\nthat goes to the patch"
UPDATE = "|update| / |hidden state|"
EFFECTS = {
    "occlusion": "log-probability lost\nwhen hidden (purple:\nthe answer needs it)",
    "gradients": "integrated gradients\nof the log-probability\n(purple: for the answer)",
}


def draw_image(document: Mapping[str, Any], target: Path) -> list[Path]:
    """Draw a row of overlays for each model; maps of one kind have one colour scale, over all words and models.

    Args:
        document: image.json.
        target: the picture's path, without the suffix.

    Returns:
        the files: PNG and SVG.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    models, scales = document["models"], scales_of(document["models"])
    words = max(min(WORDS, len(model["words"])) for model in models)
    kinds = [kind for kind in ("effect", "update") if any("values" in model[kind] for model in models)]
    columns = 1 + words + len(kinds)
    left, top, right, bottom = _limits(document)
    height = PANEL * min(max((bottom - top) / (right - left), 0.4), 2.0) + 0.45
    figure = new_figure((PANEL * columns, height * len(models) + 1.3))
    figure.suptitle("\n".join(wrap(document["settings"]["question"], 16 * columns)[:3]), fontsize=11, parse_math=False)
    grid = figure.add_gridspec(len(models) + 1, columns, height_ratios=[*[1.0] * len(models), 0.04])
    axes = [[figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(len(models))]
    pixels = _thumbnail(document)
    drawn: dict[str, Any] = {}
    for row, model in zip(axes, models, strict=True):
        for place in row:
            _prepare(place, (left, top, right, bottom))
        _picture(row[0], document, pixels)
        said = shorten(model["answer"], 60, placeholder=" ...")
        _title(row[0], f'{model["name"]}:\n"{said}" (p = {math.exp(model["log_probability"]):.2g})')
        for place, word in zip(row[1:], model["words"][:WORDS], strict=False):
            drawn["attention"] = _overlay(place, document, model, pixels, word["attention"], (0, scales["attention"]))
            _mark(place, model)
            _title(place, f"attention:\n{word['text']}")
        if len(model["words"]) > WORDS:
            row[words].set_xlabel(f"first {WORDS} of {len(model['words'])} words", fontsize=7)
        for place in row[1 + len(model["words"][:WORDS]) : 1 + words]:
            place.set_axis_off()
        for place, kind in zip(row[1 + words :], kinds, strict=True):
            _title(place, TITLES[kind])
            if "values" not in model[kind]:
                _say(place, model[kind]["left_out"])
                continue
            low = -scales[kind] if kind == "effect" else 0
            drawn[kind] = _overlay(place, document, model, pixels, model[kind]["values"], (low, scales[kind]))
    bars = {"attention": grid[-1, 1 : 1 + words]}
    bars |= {kind: grid[-1, 1 + words + number] for number, kind in enumerate(kinds)}
    for kind, image in drawn.items():
        _bar(figure, image, bars[kind], kind, models)
    return save_figure(figure, target)


def scales_of(models: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the end of the colour scale of each kind of map: its largest value in any model, sinks left out."""
    found = {"attention": 0.0, "effect": 0.0, "update": 0.0}
    for model in models:
        sinks = {tuple(place) for place in model["sinks"]}
        for word in model["words"][:WORDS]:
            shares = [
                value
                for row, line in enumerate(word["attention"])
                for column, value in enumerate(line)
                if (row, column) not in sinks
            ]
            found["attention"] = max([found["attention"], *shares])
        for kind in ("effect", "update"):
            for line in model[kind].get("values", ()):
                found[kind] = max([found[kind], *(abs(value) for value in line if value is not None)])
    return {kind: end or 1.0 for kind, end in found.items()}


def _limits(document: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return what the panels show: the image, and the padding that a model sees around it."""
    boxes = [model["grid"]["box"] for model in document["models"]]
    whole = [0, 0, document["image"]["width"], document["image"]["height"]]
    ends = (min, min, max, max)
    left, top, right, bottom = (end(whole[number], *(box[number] for box in boxes)) for number, end in enumerate(ends))
    return left, top, right, bottom


def _thumbnail(document: Mapping[str, Any]) -> Any:
    from PIL import Image

    data = base64.b64decode(document["image"]["thumbnail"].partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def _prepare(place: Any, limits: tuple[float, float, float, float]) -> None:
    """Give an empty panel the coordinates of the image, with grey where there is none."""
    left, top, right, bottom = limits
    place.set_xlim(left, right)
    place.set_ylim(bottom, top)
    place.set_aspect("equal")
    place.set_xticks([])
    place.set_yticks([])
    place.set_facecolor("0.85")


def _picture(place: Any, document: Mapping[str, Any], pixels: Any, **look: Any) -> None:
    extent = (0, document["image"]["width"], document["image"]["height"], 0)
    limits = place.get_xlim(), place.get_ylim()
    place.imshow(pixels, extent=extent, **look)
    place.set_xlim(limits[0])
    place.set_ylim(limits[1])


def _overlay(
    place: Any,
    document: Mapping[str, Any],
    model: Mapping[str, Any],
    pixels: Any,
    values: Sequence[Sequence[float | None]],
    scale: tuple[float, float],
) -> Any:
    """Draw a map over a grey copy of the image; patches without a value (NaN) stay clear."""
    import numpy

    _picture(place, document, pixels.convert("L"), cmap="gray", vmin=-60, vmax=255)
    left, top, right, bottom = model["grid"]["box"]
    limits = place.get_xlim(), place.get_ylim()
    table = numpy.array([[numpy.nan if value is None else value for value in line] for line in values], dtype=float)
    image = place.imshow(
        table,
        extent=(left, right, bottom, top),
        cmap=SIGNED if scale[0] < 0 else SHARES,
        vmin=scale[0],
        vmax=scale[1],
        alpha=OPACITY,
        interpolation="nearest",
    )
    place.set_xlim(limits[0])
    place.set_ylim(limits[1])
    return image


def _mark(place: Any, model: Mapping[str, Any]) -> None:
    """Cross out the sinks, whose values the colour scale does not reach."""
    from matplotlib.patches import Rectangle

    grid = model["grid"]
    left, top, right, bottom = grid["box"]
    wide, high = (right - left) / grid["columns"], (bottom - top) / grid["rows"]
    for row, column in model["sinks"]:
        x, y = left + column * wide, top + row * high
        place.add_patch(Rectangle((x, y), wide, high, fill=False, edgecolor="black", linewidth=0.8, hatch="xxxx"))


def _title(place: Any, text: str) -> None:
    lines = [part for line in text.split("\n") for part in wrap(line, 26) or [""]]
    place.set_title("\n".join(lines), fontsize=8, parse_math=False)


def _say(place: Any, text: str) -> None:
    """Write why there is no map."""
    place.set_facecolor("white")
    place.text(
        0.5,
        0.5,
        "\n".join(wrap(text, 22)),
        ha="center",
        va="center",
        fontsize=7,
        color="0.3",
        transform=place.transAxes,
    )


def _bar(figure: Any, image: Any, place: Any, kind: str, models: Sequence[Mapping[str, Any]]) -> None:
    label = {"attention": ATTENTION, "update": UPDATE}.get(kind, "")
    measured = [model[kind] for model in models if "values" in model.get(kind, ())]
    if kind == "effect":
        label = EFFECTS[measured[0]["kind"]]
    if any(value is None for each in measured for line in each["values"] for value in line):
        label += "\n(clear: not steered)"
    sinks = kind == "attention" and any(model["sinks"] for model in models)
    if sinks:
        label = f"{label}\n(crossed: sinks, beyond the scale)"
    bar = figure.colorbar(
        image,
        cax=figure.add_subplot(place),
        orientation="horizontal",
        extend="max" if sinks else "neither",
        extendfrac=0.03,
    )
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(axis="x", nbins=4)
