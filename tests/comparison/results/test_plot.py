"""The picture shows every method that has a score, and no label covers another.

Covers `comparison/results/plot.py` and `comparison/results/labels.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from comparison_records import BASE, record
from PIL import Image

from llava_steering_plugin.comparison.records import FAILED
from llava_steering_plugin.comparison.results.labels import Label, name_line, place_labels
from llava_steering_plugin.comparison.results.plot import draw
from llava_steering_plugin.comparison.results.summarising import summarise

pytest.importorskip("matplotlib")


def placed(labels: list[Label]) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Return the texts that are placed, with their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(4.6, 3.7))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(1e2, 1e7)
    axes.set_ylim(0, 100)
    figure.draw_without_rendering()
    notes = place_labels(axes, labels, [], 8.0)
    inside = axes.get_window_extent()
    found = []
    for note in notes:
        box = Text.get_window_extent(note, canvas.get_renderer())
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        found.append((note.get_text(), box.extents))
    return found


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


def test_labels_of_points_that_lie_on_each_other_do_not_overlap() -> None:
    labels = [Label(f"a method of number {n}", 1e4 * (1 + n / 50), 60 + n / 10, "C0") for n in range(7)]
    found = placed(labels)
    assert sorted(text for text, _ in found) == sorted(label.text for label in labels)
    for (_, one), (_, other) in itertools.combinations(found, 2):
        assert not overlap(one, other)


def test_a_single_label_stands_beside_its_point() -> None:
    ((text, box),) = placed([Label("MoReS", 1e4, 50, "C0")])
    assert text == "MoReS" and box[2] - box[0] > 10


def test_the_name_of_a_line_covers_no_point_on_it() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.7))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(1e2, 1e6)
    axes.set_ylim(-1, 1)
    figure.draw_without_rendering()
    points = [Label(name, x, 0.02, "C0") for name, x in (("left", 2e2), ("right", 5e5))]
    note = name_line(axes, "base (frozen)", 0.0, points, 8.0, "0.5")
    box = note.get_window_extent(canvas.get_renderer())
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        assert not (box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1)
    assert note.get_text() == "base (frozen)" and len(axes.texts) == 1


def test_every_task_and_test_has_a_panel_and_every_method_its_name(tmp_path: Path) -> None:
    records = []
    for task in ("colours", "shapes"):
        records.append(record(tmp_path, BASE, 1, [0, 0, 1], task=task))
        for number, method in enumerate(("MoReS", "LoRA")):
            parameters = {"trained_parameters": 10 ** (3 + number)}
            for seed in (1, 2):
                lost = {"status": FAILED} if (task, method, seed) == ("shapes", "LoRA", 2) else {}
                records.append(record(tmp_path, method, seed, [1, 0, seed - 1], task=task, **parameters, **lost))
    records.append(record(tmp_path, "IA3", 1, task="shapes", status=FAILED))
    files = draw(summarise(records, tmp_path), tmp_path / "results")
    assert [file.name for file in files] == ["results.png", "results.svg"]
    drawn = files[1].read_text()
    for text in ("colours", "shapes", "MoReS", "LoRA (1 of 2 seeds)", BASE, "no result: IA3", "trained parameters"):
        assert f">{text}<" in drawn, text
    assert "projector" not in drawn
    first = Image.open(files[0]).convert("RGB")
    assert first.getpixel((2, 2)) == (255, 255, 255) and len(set(first.resize((200, 90)).getdata())) > 20


def test_the_same_records_give_the_same_picture(tmp_path: Path) -> None:
    records = [record(tmp_path, method, 1, [1, 0], projector_parameters=7) for method in ("A", "B")]
    summary = summarise(records, tmp_path)
    one, other = ([file.read_bytes() for file in draw(summary, tmp_path / "results")] for _ in range(2))
    assert one == other and b"projector included" in one[1]


def test_without_a_score_there_is_no_picture(tmp_path: Path) -> None:
    summary = summarise([record(tmp_path, "A", 1, status=FAILED), record(tmp_path, BASE, 1, [1])], tmp_path)
    assert draw(summary, tmp_path / "results") == [] and not list(tmp_path.glob("results*"))
