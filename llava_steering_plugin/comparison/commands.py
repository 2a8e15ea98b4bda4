"""Build the command lines of a cell: LLaVA's training, `llava-steering eval` and `llava-steering score`.

All are words after `python`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison.cells import Cell
from llava_steering_plugin.comparison.schema import Comparison, Test

LAUNCH = "llava_steering_plugin.launch"
PROGRAM = ["-m", "llava_steering_plugin"]
# The names of a cell's files in its folder.
MODEL, MEASURED, TRAIN_LOG = "model", "measured.json", "train.log"
LORA = "lora_enable"


def training_flags(cell: Cell, comparison: Comparison, output: Path) -> list[str]:
    """Return the command line of LLaVA's training, without the program.

    Args:
        output: the folder of the comparison.
    """
    flags: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "no",
        "evaluation_strategy": "no",
        "logging_steps": 10,
        **cell.method.flags,
        "model_name_or_path": comparison.base,
        "data_path": cell.task.train,
        "image_folder": cell.task.image_folder,
        "output_dir": cell.folder(output) / MODEL,
        "learning_rate": cell.rate,
        "seed": cell.seed,
        # Otherwise transformers puts the mean of the losses before in the place of one that is no number.
        "logging_nan_inf_filter": False,
    }
    return [word for name, value in flags.items() for word in _flag(f"--{name}", value)]


def _flag(name: str, value: Any) -> Iterable[str]:
    return (name, *map(str, value)) if isinstance(value, list) else (name, str(value))


def train(cell: Cell, comparison: Comparison, output: Path) -> list[str]:
    """Return the training of a cell. At one seed, all methods see the samples in one order."""
    measured = cell.folder(output) / MEASURED
    own = ["--seed", str(cell.seed), "--same-order", "--measure", str(measured), comparison.program]
    return ["-m", LAUNCH, *own, *training_flags(cell, comparison, output)]


def launched(words: list[str], launcher: tuple[str, ...]) -> list[str]:
    """Return a whole command, by a launcher for several ranks or by this Python."""
    return [*launcher, *words[1:]] if launcher else [sys.executable, *words]


def answer(cell: Cell, comparison: Comparison, test: Test, answers: Path, timing: Path, output: Path) -> list[str]:
    """Return the command that answers a test's questions with a cell's model.

    Args:
        timing: gets the time of an answer, and of the base's.
    """
    model = cell.folder(output) / MODEL
    own = not cell.method.frozen and cell.method.has_mode
    base = comparison.base if own or cell.method.frozen else str(model)
    options: dict[str, Any] = {
        "question-file": test.questions,
        "image-folder": test.image_folder,
        "answers-file": answers,
        "timing": timing,
        **{name.replace("_", "-"): value for name, value in comparison.answers.items()},
    }
    if own:
        options["adapter"] = model
    return [*PROGRAM, "eval", base, *_options(options)]


def score(test: Test, answers: Path, scores: Path, per_question: Path) -> list[str]:
    """Return the command that scores a file of answers. The questions may be a part of the annotations'."""
    options: dict[str, Any] = {
        "annotations": test.annotations,
        "output": scores,
        "per-question": per_question,
        "allow-missing": True,
        "split": test.split,
        "questions": test.questions if test.benchmark == "pope" and _is_llavas(test.questions) else None,
    }
    return [*PROGRAM, "score", test.benchmark, str(answers), *_options(options)]


def _is_llavas(questions: Path) -> bool:
    """Return whether a question file of POPE is LLaVA's own: its ids are numbers, which only the file explains."""
    try:
        with questions.open(encoding="utf-8-sig") as lines:
            return "/" not in str(json.loads(next(lines))["question_id"])
    except (OSError, ValueError, StopIteration, LookupError, TypeError):
        return False


def _options(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words
