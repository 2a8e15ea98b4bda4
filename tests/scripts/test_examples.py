"""The examples in `scripts/examples` are short enough to copy; they run in tests/transformers/test_trl.py."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def test_an_example_is_about_forty_lines_of_public_names() -> None:
    lines = (EXAMPLES / "trl_mores.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 45
    assert [line for line in lines if "llava_steering_plugin." in line] == []
