"""A changed value in an official file or in the answers is scored, prepared or refused, and never a traceback.

Covers `evaluation/scoring.py` and `evaluation/preparing.py` with all their readers. More of them:
FUZZ_COUNT=20000 FUZZ_SEED=5 pytest tests/evaluation/test_mutated_files.py
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark_folders import SCORED, make
from official_sources import MAKERS, make_source

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.evaluation.preparing import prepare
from llava_steering_plugin.evaluation.scoring import score

COUNT, SEED = int(os.environ.get("FUZZ_COUNT", 240)), int(os.environ.get("FUZZ_SEED", 0))
VALUES = (None, True, 3, -1, 1.5, "", "x", [], [1], {}, {"a": 1}, "\ud800", 10**30, float("inf"), "../x")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to every value in a value, itself included."""
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*place, key))


def changed(value: Any, draw: random.Random) -> Any:
    """Return JSON in which one value is another one, or gone."""
    *path, last = draw.choice([place for place in places(value) if place] or [("",)])
    if last == "":
        return draw.choice(VALUES)
    holder = value
    for key in path:
        holder = holder[key]
    if draw.random() < 0.3:
        del holder[last]
    else:
        holder[last] = draw.choice(VALUES)
    return value


def change(file: Path, draw: random.Random) -> None:
    """Change one value of a JSON file or of one of its lines; of another file, one byte."""
    content = file.read_bytes()
    if file.suffix not in (".json", ".jsonl"):
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes((draw.randrange(256),)) + content[place + 1 :])
        return
    try:
        file.write_text(json.dumps(changed(json.loads(content), draw)))
    except json.JSONDecodeError:  # several lines
        lines = content.decode().splitlines()
        place = draw.randrange(len(lines))
        lines[place] = json.dumps(changed(json.loads(lines[place]), draw))
        file.write_text("\n".join(lines) + "\n")


def run_mutants(files: list[Path], count: int, draw: random.Random, run: Callable[[], object]) -> tuple[int, int]:
    """Run with one changed file after the other; return how many ran and how many were refused."""
    ran = refused = 0
    for _ in range(count):
        file = draw.choice(files)
        whole = file.read_bytes()
        change(file, draw)
        try:
            run()
            ran += 1
        except SteeringError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{file} with {file.read_bytes()[:2000]!r}") from error
        finally:
            file.write_bytes(whole)
    return ran, refused


def test_scores_of_changed_files_are_numbers_or_one_message(tmp_path: Path) -> None:
    ran = refused = 0
    for task in SCORED:
        case = make(task, tmp_path / task / "official")
        answers = case.write_answers(tmp_path / task / "answer.jsonl")
        files = [answers, *sorted(file for file in (tmp_path / task / "official").rglob("*") if file.is_file())]

        def run(task: str = task, answers: Path = answers, annotations: Path = case.annotations) -> None:
            json.dumps(score(task, answers, annotations, allow_missing=True).as_json())

        more = run_mutants(files, COUNT // len(SCORED), random.Random(f"{SEED} {task}"), run)
        ran, refused = ran + more[0], refused + more[1]
    assert ran and refused


def test_changed_layouts_are_prepared_or_refused_in_one_message(tmp_path: Path) -> None:
    ran = refused = 0
    for task in MAKERS:
        source = make_source(task, tmp_path / task)
        pictures = (".jpg", ".png")
        files = sorted(file for file in source.rglob("*") if file.is_file() and file.suffix not in pictures)

        def run(task: str = task, source: Path = source) -> None:
            prepare(task, source, tmp_path / "data" / task)

        more = run_mutants(files, COUNT // len(MAKERS) // 2, random.Random(f"{SEED} {task}"), run)
        ran, refused = ran + more[0], refused + more[1]
    assert ran and refused
    assert not list((tmp_path / "data").rglob("*.partial"))
