"""Figures look different for different numbers, and are written as PNG and SVG: figures.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.figures import look_of, new_figure, save_figure


def test_the_first_49_looks_are_all_different() -> None:
    assert len({tuple(look_of(number).values()) for number in range(49)}) == 49


def test_a_figure_is_written_in_both_formats_with_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = []
    for _ in range(2):
        figure = new_figure((2, 1))
        figure.subplots().plot([1, 2], [2, 1])
        files = save_figure(figure, tmp_path / "curve")
        written.append([file.read_bytes() for file in files])
    assert [file.name for file in files] == ["curve.png", "curve.svg"]
    assert written[0] == written[1]


def test_a_figure_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentsError, match=r"curve\.png cannot be written"):
        save_figure(new_figure((2, 1)), tmp_path / "none" / "curve")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentsError, match=r"pictures need matplotlib: pip install -e '\.\[diagnostics\]'"):
        new_figure((2, 1))
