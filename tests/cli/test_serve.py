"""`llava-steering serve`: its options before the server starts. The running server: tests/serving/test_launcher.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steering_plugin.cli.serve import absolute_path, with_whole_paths
from llava_steering_plugin.serving.options import ServeOptions


def test_the_base_of_serve_may_be_a_path_that_no_file_system_takes() -> None:
    assert absolute_path("x" * 300) == "x" * 300


def test_paths_become_absolute_because_the_programs_run_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    given = ServeOptions(base="base", adapters=["x"], more_adapters=["owner/y"], adapter_dir=Path("shelf"))
    options = with_whole_paths(given, {"x": str(tmp_path / "x"), "y": "owner/y"})
    assert options.base == str(tmp_path / "base") and options.adapter_dir == tmp_path / "shelf"
    assert options.adapter_words == [f"x={tmp_path / 'x'}", "y=owner/y"]
    assert with_whole_paths(ServeOptions(base="owner/base"), {}).base == "owner/base"
