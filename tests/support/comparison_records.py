"""Make the files of a comparison as `llava-steering compare` leaves them, with scores that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison.records import DONE, TEST, Record, Score

BASE = "base (frozen)"


def record(
    output: Path,
    method: str,
    seed: int = 1,
    points: Sequence[float] | Mapping[str, Sequence[float]] | None = (),
    *,
    task: str = "colours",
    rate: float = 0.01,
    split: str = TEST,
    status: str = DONE,
    **more: Any,
) -> Record:
    """Return the record of an evaluation, and write what its questions are worth.

    Args:
        points: what each question of the test "held out" is worth, or of several tests by name; None: no files.
    """
    rate = 0.0 if method == BASE else rate
    cell = f"{task}-{method}-{rate}-{seed}"
    scores = {}
    tests = points if isinstance(points, Mapping) else {"held out": points or ()}
    for test, worth in tests.items() if status == DONE and points is not None else ():
        file = f"points/{len(list(output.glob('points/*')))}.jsonl"
        (output / file).parent.mkdir(exist_ok=True)
        lines = [{"question_id": str(number), "score": value} for number, value in enumerate(worth)]
        (output / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores[test] = Score("exact_match", 100 * sum(worth) / len(worth), len(worth), "answers.jsonl", file)
    known = {"trained_parameters": 0 if method == BASE else 1000, "scores": scores, **more}
    if status != DONE:
        known.setdefault("error", f"it {status}")
    return Record(cell, task, method, {}, rate, seed, split, status, **known)
