"""Without a tuning mode, a patched LLaVA with the plugin installed is upstream, bit for bit.

Each side runs every program in `whole_pipeline.py` in a process of its own; then all that they wrote is compared.
Not compared: run times, training_args.bin (it names the class of the arguments) and the random answer ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[1] / "support" / "whole_pipeline.py"
TIMINGS = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
NOT_COMPARED = {"training_args.bin", "side.json"}
SHOWN = 20  # differences, where everything may differ


@pytest.fixture(scope="module")
def sides(
    tiny: TinyLlava, pristine_llava: Path, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folders with what each side wrote."""
    running = {}
    for side, llava, flags in (
        ("pristine", pristine_llava, []),
        ("patched", patched_llava, []),
        ("mode none", patched_llava, ["--tuning_mode", "none"]),
    ):
        folder = tmp_path_factory.mktemp(side.replace(" ", "-"))
        environment = subprocess_environment(llava)
        environment["PYTHONPATH"] += os.pathsep + str(PROGRAM.parent)
        with (folder / "side.log").open("w") as log:
            command = [sys.executable, str(PROGRAM), str(tiny.root), *flags]
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        running[side] = folder, process
    ended = {side: process.wait(timeout=600) for side, (_, process) in running.items()}
    for side, status in ended.items():
        if status:
            log_end = (running[side][0] / "side.log").read_text()[-6000:]
            pytest.fail(f"the {side} side ended with {status}:\n{log_end}", pytrace=False)
    return {side: folder for side, (folder, _) in running.items()}


def test_the_plugin_is_there_on_the_patched_sides_only(
    sides: dict[str, Path], pristine_llava: Path, patched_llava: Path
) -> None:
    for side, folder in sides.items():
        ran = json.loads((folder / "side.json").read_text())
        expected = pristine_llava if side == "pristine" else patched_llava
        assert Path(ran["llava"]).is_relative_to(expected)
        assert ("llava_steering_plugin.upstream.train.training" in ran["plugin"]) == (side != "pristine")
        assert ("llava_steering_plugin.upstream.model.loading" in ran["plugin"]) == (side != "pristine")


@pytest.mark.parametrize("kind", ["stage1", "full", "lora"])
def test_training_without_a_mode_gives_the_losses_weights_and_configs_of_upstream(
    sides: dict[str, Path], kind: str
) -> None:
    assert _losses(sides["pristine"] / f"llava-{kind}"), "nothing was trained, so nothing is shown"
    _assert_same_folder(sides["pristine"] / f"llava-{kind}", sides["patched"] / f"llava-{kind}")


@pytest.mark.parametrize("kind", ["stage1", "full", "lora"])
def test_training_with_tuning_mode_none_gives_the_losses_weights_and_configs_of_upstream(
    sides: dict[str, Path], kind: str
) -> None:
    _assert_same_folder(sides["pristine"] / f"llava-{kind}", sides["mode none"] / f"llava-{kind}")


def test_loading_gives_the_names_configs_tensors_and_answers_of_upstream(sides: dict[str, Path]) -> None:
    pristine, patched = (json.loads((sides[side] / "loaded.json").read_text()) for side in ("pristine", "patched"))
    assert len({answer for model in pristine for answer in model["texts"]}) > 6, (
        "the answers are too alike to show much"
    )
    _assert_same(pristine, patched, "loaded")


def test_evaluation_gives_the_answers_of_upstream(sides: dict[str, Path]) -> None:
    pristine, patched = (_answers(sides[side] / "answers" / "full.jsonl") for side in ("pristine", "patched"))
    assert len({answer["text"] for answer in pristine}) == len(pristine) == 6
    _assert_same(pristine, patched, "answers")


def _assert_same(expected: Any, actual: Any, where: str) -> None:
    differences = list(_differences(expected, actual, where))
    if differences:
        shown = differences[:SHOWN] + [f"and {len(differences) - SHOWN} more"] * (len(differences) > SHOWN)
        pytest.fail("\n".join(shown), pytrace=False)


def _assert_same_folder(expected: Path, actual: Path) -> None:
    names = [
        {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} for folder in (expected, actual)
    ]
    assert names[0] == names[1]
    compared = sorted(name for name in names[0] if Path(name).name not in NOT_COMPARED)
    contents = [{name: _content(folder / name) for name in compared} for folder in (expected, actual)]
    _assert_same(contents[0], contents[1], expected.name)


def _content(file: Path) -> Any:
    """Something that `_differences` takes apart; the raw bytes of files that hold no times and no objects."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix in (".bin", ".pt", ".pth"):
        return torch.load(file, weights_only=False)  # our own files; the state of the random generators is no tensor
    return file.read_bytes()


def _differences(expected: Any, actual: Any, where: str) -> Iterator[str]:
    """Where two structures of tensors, numbers and text are not bit for bit the same."""
    if type(expected) is not type(actual):
        yield f"{where}: {type(expected)} became {type(actual)}"
    elif isinstance(expected, dict):
        if list(expected) != list(actual):
            yield f"{where}: the keys {list(expected)} became {list(actual)}"
        else:
            for key in (key for key in expected if key not in TIMINGS):
                yield from _differences(expected[key], actual[key], f"{where} {key}")
    elif isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            yield f"{where}: {len(expected)} items became {len(actual)}"
        for position, (one, other) in enumerate(zip(expected, actual, strict=False)):
            yield from _differences(one, other, f"{where}[{position}]")
    elif isinstance(expected, torch.Tensor):
        if expected.dtype != actual.dtype or not torch.equal(_bits(expected), _bits(actual)):
            yield f"{where}: another tensor"
    elif hasattr(expected, "tobytes"):
        if expected.tobytes() != actual.tobytes():
            yield f"{where}: another array"
    elif expected != actual:
        shown = f": {expected!r} became {actual!r}" if len(repr(expected)) < 200 else " differs"
        yield f"{where}{shown}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _answers(file: Path) -> list[dict[str, Any]]:
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in answer.items() if key != "answer_id"} for answer in answers]
