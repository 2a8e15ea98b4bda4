"""scripts/all_combinations.sh: language models with towers, connectors and tuning methods, on tiny random models.

Covers the package `experiments.combinations`. The slow test runs a selection in which every pair of parts occurs, and a
few that are refused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from quick_runs import SCRIPTS
from training_runs import subprocess_environment

from experiments.combinations import running
from experiments.combinations.cells import (
    CONNECTORS,
    COVERED,
    LANGUAGE_MODELS,
    METHODS,
    NEWER,
    TOWERS,
    Cell,
    all_cells,
    pairs,
    pairwise,
    possible,
)
from experiments.combinations.outcomes import FAILED, OK, REFUSED, Outcome, read, write
from experiments.combinations.parts import Parts
from experiments.combinations.running import Runner
from experiments.combinations.table import markdown
from experiments.combinations.trial import Refused
from llava_steering_plugin.components.registry import CONNECTORS as INSTALLED_CONNECTORS
from llava_steering_plugin.components.registry import LANGUAGE_MODELS as INSTALLED_LANGUAGE_MODELS
from llava_steering_plugin.components.registry import TOWERS as INSTALLED_TOWERS

NO_PARTS = Parts({}, {}, None)
CELLS = [Cell("phi", "clip", "linear", method) for method in METHODS]


@pytest.fixture(scope="module")
def chosen() -> list[Cell]:
    return pairwise(cell for cell in all_cells() if possible(cell) and cell.connector in COVERED)


def outcome(result: str = OK, reason: str = "") -> Outcome:
    return Outcome(result, reason, 1.0, "2026-01-01T00:00:00+00:00", {})


def test_every_pair_of_parts_occurs_in_at_most_40_combinations(chosen: list[Cell]) -> None:
    assert len(set(chosen)) == len(chosen) <= 40
    assert all(possible(cell) for cell in chosen)
    covered = set().union(*map(pairs, chosen))
    # Worked out by hand, not by `pairs`: what goes together at all.
    for tower, connector in product(TOWERS, COVERED):
        assert (((1, tower), (2, connector)) in covered) == (connector != "mof-mlp" or tower == "mof")
    places: tuple[tuple[str, ...], ...] = (LANGUAGE_MODELS, TOWERS, COVERED, METHODS)
    for one, other in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)):
        for left, right in product(places[one], places[other]):
            assert ((one, left), (other, right)) in covered


def test_the_selection_is_the_same_in_every_run(chosen: list[Cell]) -> None:
    backwards = [cell for cell in reversed(all_cells()) if possible(cell) and cell.connector in COVERED]
    assert pairwise(backwards) == chosen


def test_an_ended_run_has_tried_all_parts_together_once_before_any_twice() -> None:
    cells = all_cells()
    assert len(set(cells)) == len(cells) == 9 * 6 * 8 * 3
    first = {(cell.language_model, cell.tower, cell.connector) for cell in cells[: len(cells) // 3]}
    assert len(first) == len(cells) // 3
    assert {cell.method for cell in cells[: len(cells) // 3] if cell.language_model == "phi"} == set(METHODS)


def test_no_component_of_the_package_is_left_out() -> None:
    def ours(group: Any) -> set[str]:
        return {name for name in group.names() if group.package(name) == "llava-steering-plugin"}

    assert set(TOWERS) == ours(INSTALLED_TOWERS) | {"clip"}
    assert set(CONNECTORS) == ours(INSTALLED_CONNECTORS) | {"identity", "linear", "mlp2x_gelu"}
    assert {*LANGUAGE_MODELS, *NEWER} == ours(INSTALLED_LANGUAGE_MODELS) | {"llama"}


def test_the_table_says_what_came_out_and_gives_each_reason_once() -> None:
    narrow = "this training cannot start:\n  - identity: 48 is not 64\n  - and more"
    outcomes = {cell: outcome() for cell in CELLS}
    for tower, method in product(("siglip", "dinov2"), METHODS):
        outcomes[Cell("phi", tower, "identity", method)] = outcome(REFUSED, narrow)
    outcomes[Cell("phi", "clip", "avgpool", "mores")] = outcome(FAILED, "RuntimeError: broken\nmore")
    outcomes[Cell("phi", "clip", "avgpool", "lora")] = outcome()
    outcomes[Cell("gemma", "clip", "avgpool", "lora")] = outcome(REFUSED, "needs transformers 4.38")
    assert markdown(outcomes).splitlines() == [
        "| tower | connector | phi |",
        "| --- | --- | --- |",
        "| `clip` | `linear` | ok |",
        "| `clip` | `avgpool` | mores failed (1), lora ok |",
        "| `siglip` | `identity` | refused (2) |",
        "| `dinov2` | `identity` | refused (2) |",
        "",
        "1. RuntimeError: broken",
        "2. identity: 48 is not 64",
        "- `gemma` is refused with every tower and connector: needs transformers 4.38",
    ]


def test_a_combination_that_fails_refuses_or_crashes_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(cell: Cell, parts: Parts, folder: Path) -> None:
        assert folder.is_dir()
        if cell.method == "mores":
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.method == "lora":
            raise Refused("too wide")
        if cell.connector == "qformer":
            raise ValueError(f"not in {folder}")

    monkeypatch.setattr(running, "attempt", attempt)
    broken = Cell("phi", "clip", "qformer", "mixlora")
    ended: list[tuple[Cell, Outcome]] = []
    Runner(tmp_path, {"a": 1}).run([*CELLS, broken], NO_PARTS, 2, lambda cell, found: ended.append((cell, found)))
    found = read(tmp_path / "results", [*CELLS, broken])
    assert found == dict(ended) and len(ended) == 4
    said = {cell: (each.result, each.reason) for cell, each in found.items()}
    assert said == {
        CELLS[0]: (FAILED, "its process ended with -9"),
        CELLS[1]: (OK, ""),
        CELLS[2]: (REFUSED, "too wide"),
        broken: (FAILED, f"ValueError: not in {Path('...', 'work', broken.name)}"),
    }
    logs = {file.name for file in (tmp_path / "logs").iterdir()}
    assert logs == {f"{cell.name}.txt" for cell in (CELLS[0], broken)}
    assert not (tmp_path / "work").exists()


def test_half_a_file_counts_as_none(tmp_path: Path) -> None:
    for cell in CELLS:
        write(tmp_path, cell, outcome())
    whole = (tmp_path / f"{CELLS[0].name}.json").read_text()
    (tmp_path / f"{CELLS[0].name}.json").write_text(whole[:40])
    (tmp_path / f"{CELLS[1].name}.json").write_text('{"result": "ok"}')
    assert list(read(tmp_path, CELLS)) == [CELLS[2]]


def command(llava: Path, output: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = subprocess_environment(llava, {"COLUMNS": "200"})
    return [sys.executable, str(SCRIPTS / "experiments" / "combinations"), "--output", str(output), *words], environment


def run(llava: Path, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    words_of_it, environment = command(llava, output, *words)
    return subprocess.run(words_of_it, env=environment, text=True, capture_output=True, timeout=900)


def test_a_wrong_name_is_refused_and_a_dry_run_runs_nothing(patched_llava: Path, tmp_path: Path) -> None:
    wrong = run(patched_llava, tmp_path, "--only", "qwen3+cilp")
    assert wrong.returncode == 2 and "no combination has this in its name" in wrong.stderr
    dry = run(patched_llava, tmp_path, "--only", "phi+timm+avgpool", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert sorted(dry.stdout.splitlines()[1:]) == sorted(f"phi+timm+avgpool+{method}" for method in METHODS)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_all_pairs_train_load_answer_and_resume_also_after_a_kill(
    patched_llava: Path, tmp_path: Path, chosen: list[Cell], record_property: Any
) -> None:
    words, environment = command(patched_llava, tmp_path, "--pairs")
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while len(read(tmp_path / "results", chosen)) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    assert process.poll() is None, "it ended by itself"
    process.kill()
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}

    done = run(patched_llava, tmp_path, "--pairs")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{len(chosen)} ok, 0 refused, 0 failed" in done.stdout
    found = read(tmp_path / "results", chosen)
    assert len(found) == len(chosen) and {each.result for each in found.values()} == {OK}
    assert {file: file.stat().st_mtime_ns for file in before} == before
    record_property("counts", f"{len(found)} combinations: {sum(each.seconds for each in found.values()):.0f} s")

    refused = run(
        patched_llava, tmp_path, "--only", "gemma+clip+linear+mores", "--only", "llama+siglip+identity",
        "--only", "mistral+clip+mof-mlp+lora",
    )  # fmt: skip
    assert refused.returncode == 0 and "0 ok, 5 refused, 0 failed" in refused.stdout, refused.stdout
    for reason in (
        "needs transformers 4.38 or newer",
        "the vision tower gives tokens of width 48, and the language model takes 64",
        "give --vision_tower mof:CLIP+DINOV2",
    ):
        assert reason in refused.stdout
