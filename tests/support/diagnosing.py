"""`llava-steering diagnose` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app


def diagnosed(measure: str, tiny: TinyLlava, output: Path, *words: str) -> dict[str, Any]:
    """Runs a measure over the images of the tiny LLaVA, raises what it raises, and returns its JSON."""
    command = ["diagnose", measure, *words, "--image-folder", str(tiny.images), "--output", str(output)]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((output / f"{measure}.json").read_text())
    return found
