"""Measure what tuned models do, with `llava-steering diagnose`, and gather it on one page.

It is apart from `commands`, so that a change here trains nothing again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.commands import NEW_TOKENS
from experiments.stages import Context

# The name that a report has in the folder of its stage.
REPORT = "report.html"


def modality(stage: Context, models: Mapping[str, Path], questions: Path, pictures: Path, samples: int) -> None:
    """Measure attention to image and text of all models, on their own answers."""
    flags: dict[str, object] = {
        "question-file": questions,
        "image-folder": pictures,
        "samples": samples,
        "conv-mode": "v1",
        "max-new-tokens": NEW_TOKENS,
        "batch-size": 32,
    }
    _diagnose(stage, "modality", models, flags)


def interference(stage: Context, models: Mapping[str, Path], data: Path, pictures: Path, samples: int) -> None:
    """Measure how much the tasks of `data` help or harm each other in LoRAs and MixLoRAs."""
    flags: dict[str, object] = {"data": data, "image-folder": pictures, "samples": samples, "version": "v1"}
    _diagnose(stage, "interference", models, flags)


def steering(stage: Context, models: Mapping[str, Path], questions: Path, pictures: Path, samples: int) -> None:
    """Measure what each layer of MoReS adapters does, and what is lost without it."""
    flags: dict[str, object] = {"question-file": questions, "image-folder": pictures, "samples": samples}
    _diagnose(stage, "steering", models, flags)


def routing(stage: Context, models: Mapping[str, Path], data: Path, pictures: Path, samples: int) -> None:
    """Measure how MixLoRA adapters choose factors, and what is lost with other choices."""
    flags: dict[str, object] = {"data": data, "image-folder": pictures, "samples": samples, "version": "v1"}
    _diagnose(stage, "routing", models, flags)


def image(stage: Context, name: str, model: Path, picture: Path, question: str) -> None:
    """Draw where a model looks in one picture while it answers a question."""
    _diagnose(stage, "image", {name: model}, {"image": picture, "question": question})


def report(stage: Context) -> None:
    """Write the page of all that was measured in the stage's folder."""
    stage.run([*_PROGRAM, "report", str(stage.folder), "-o", str(stage.folder / REPORT)])


def image_shares(stage: Context) -> dict[str, list[float]]:
    """Return the share of each model's attention that goes to the image, layer by layer."""
    document = json.loads((stage.folder / "modality.json").read_text())
    return {model["name"]: model["shares"]["image"]["mean"] for model in document["models"]}


_PROGRAM = [sys.executable, "-m", "llava_steering_plugin"]


def _diagnose(stage: Context, measure: str, models: Mapping[str, Path], flags: Mapping[str, object]) -> None:
    named = [f"{name}={path}" for name, path in models.items()]
    given: dict[str, Any] = {**flags, "output": stage.folder, "device": "cpu"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    stage.run([*_PROGRAM, "diagnose", measure, *named, *words])
