"""`llava-steering diagnose` in this process, and adapters for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from steered import strengthen
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin import attach, remove_adapter, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.cli import app
from llava_steering_plugin.modes.base import Mode


def diagnosed(measure: str, tiny: TinyLlava, output: Path, *words: str) -> dict[str, Any]:
    """Runs a measure over the images of the tiny LLaVA, raises what it raises, and returns its JSON.

    What it says on standard error goes to that of the test.
    """
    command = ["diagnose", measure, *words, "--image-folder", str(tiny.images), "--output", str(output)]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"])
    sys.stderr.write(result.stderr)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((output / f"{measure}.json").read_text())
    return found


def saved_adapter(
    model: Any, mode: Mode, folder: Path, tiny: TinyLlava, change: Callable[[Attachment], None] | None = None
) -> Path:
    """Saves an adapter of that mode that is far from the identity, for the tiny LLaVA, and takes it off the model.

    Args:
        change: is given the adapter before it is saved.
    """
    attachment = strengthen(attach(model, mode))
    if change is not None:
        change(attachment)
    described = describe(attachment)
    base = replace(described.base, name_or_path=str(tiny.llava))
    attachment.config = replace(described, conversation="v1", base=base)
    save_adapter(model, folder)
    remove_adapter(model)
    return folder
