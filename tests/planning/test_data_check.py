"""`llava-steering check-data` (`cli/check_data.py`): the bad samples of a file, with counts and token lengths.

Covers `planning/data_check.py` and `planning/data_report.py`. That it agrees with trainings:
tests/training/data/test_sample_checks.py.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bad_samples import BAD, good_samples, pictured, said, write_data, write_pictures
from forks import Forks
from tiny_llava import VISUAL_TOKENS, TinyLlava
from training_runs import subprocess_environment
from typer.testing import CliRunner, Result

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import DataError, SteeringError
from llava_steering_plugin.planning import data_check
from llava_steering_plugin.planning.data_check import Checker
from llava_steering_plugin.planning.data_report import DataReport, Finding
from llava_steering_plugin.training.data.sample_checks import SampleChecks

pytest_plugins = ["fork_fixtures"]


@pytest.fixture(scope="module")
def folder(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `data.json`, the tiny LLaVA's samples and then all bad ones, and their `images`."""
    folder = tmp_path_factory.mktemp("check")
    write_pictures(tiny, folder)
    write_data(folder, [*good_samples(tiny), *(sample for sample, _ in BAD.values())])
    return folder


def check(*words: object) -> Result:
    return CliRunner().invoke(app, ["check-data", *map(str, words)])


def report_of(*words: object) -> dict[str, Any]:
    done = check(*words, "--json")
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (1 if report["bad"] or report["file_problem"] else 0)
    return report


@pytest.mark.parametrize("processes", [1, 2])
def test_all_bad_samples_are_named_with_their_kinds_whatever_the_number_of_processes(
    folder: Path, tiny: TinyLlava, processes: int
) -> None:
    report = report_of(folder / "data.json", "--image-folder", folder / "images", "--processes", processes)
    assert report.keys() == {
        *("file", "file_problem", "samples", "bad", "kinds", "problems", "text_only", "text_only_share"),
        *("without_id", "repeated_ids", "tokens", "notes"),
    }
    good = good_samples(tiny)
    assert (report["samples"], report["bad"]) == (len(good) + len(BAD), len(BAD))
    found: dict[int, set[str]] = {}
    for problem in report["problems"]:
        assert problem.keys() == {"index", "id", "kind", "reason"}
        found.setdefault(problem["index"], set()).add(problem["kind"])
    assert sorted(found) == list(range(len(good), report["samples"]))
    assert all(kind in found[len(good) + number] for number, (_, kind) in enumerate(BAD.values()))
    assert report["kinds"] == Counter(kind for kinds in found.values() for kind in kinds)
    assert report["tokens"] is None and report["file_problem"] is None and report["notes"] == []


def test_a_person_sees_counts_the_first_of_each_kind_and_what_to_do(folder: Path) -> None:
    done = check(folder / "data.json", "--image-folder", folder / "images")
    assert done.exit_code == 1
    assert f"{len(BAD)} bad" in done.stdout and "--skip_bad_samples" in done.stdout
    assert "turn 1 is from 'bot'; LLaVA knows 'human' and 'gpt'" in done.stdout
    assert "... and " in done.stdout and "sample 24: it is null" in done.stdout
    assert "checking" in done.stderr and "100%" in done.stderr  # the progress bar


def test_sound_data_is_status_0_with_lengths_and_the_share_of_text(tiny: TinyLlava, patched_llava: Path) -> None:
    words = (tiny.data, "--image-folder", tiny.images, "--model_name_or_path", tiny.llava)
    report = report_of(*words, "--model_max_length", 50)
    texts = sum("image" not in sample for sample in good_samples(tiny))
    assert report["bad"] == 0 and report["text_only"] == texts
    assert report["text_only_share"] == round(texts / report["samples"], 4)
    tokens = report["tokens"]
    assert tokens.keys() == {
        *("model_max_length", "image_tokens", "counted", "mean", "percentiles", "longest", "cut", "nothing_left"),
        "nothing_left_indices",
    }
    assert tokens["image_tokens"] == VISUAL_TOKENS and tokens["counted"] == report["samples"]
    assert 0 < tokens["nothing_left"] < tokens["cut"] < report["samples"]
    assert len(tokens["nothing_left_indices"]) == tokens["nothing_left"]
    assert list(tokens["percentiles"]) == ["50", "90", "95", "99"]
    assert tokens["percentiles"]["50"] <= tokens["percentiles"]["99"] <= tokens["longest"]
    shown = check(*words)
    assert shown.exit_code == 0
    assert "longer than 2,048, and cut: 0 (0.0%)" in shown.stdout and "0 bad" in shown.stdout


def test_samples_on_which_llavas_own_code_fails_are_found_too(
    tiny: TinyLlava, patched_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.train import train as upstream

    def failing(*args: Any, **kwargs: Any) -> None:
        raise KeyError("something new")

    monkeypatch.setattr(upstream, "preprocess", failing)
    report = report_of(tiny.data, "--model_name_or_path", tiny.llava, "--processes", 1)
    assert report["kinds"] == {"other": report["samples"]}
    assert report["problems"][0]["reason"] == "LLaVA fails on it: KeyError: 'something new'"


def test_without_a_folder_no_image_is_looked_at_and_that_is_said(folder: Path, tiny: TinyLlava) -> None:
    data = write_data(folder, [pictured("nothing.png"), *good_samples(tiny)], "unseen.json")
    report = report_of(data)
    assert report["bad"] == 0 and report["notes"] == ["no image was looked at: give --image-folder"]


def test_ids_that_come_again_or_are_missing_are_told_and_no_defect(tiny: TinyLlava, tmp_path: Path) -> None:
    text = said(("human", "What?"), ("gpt", "This."))
    entries = [text, text, {**text, "id": None}, {**text, "id": [1]}, {"conversations": text["conversations"]}]
    report = report_of(write_data(tmp_path, entries))
    assert (report["bad"], report["repeated_ids"], report["without_id"]) == (0, 1, 2)


@pytest.mark.parametrize(
    ("content", "samples", "reason"),
    [
        ('[{"id": 1}, {"id": 2}', 2, "is no JSON: Expecting ',' delimiter: line 1 column 22"),
        ('{"id": 1}\n{"id": 2}\n', 0, "Is it JSON Lines?"),
        ('{"data": []}', 0, "holds an object at its top level"),
        ("[]", 0, "holds no samples"),
    ],
    ids=["cut", "lines", "object", "empty"],
)
def test_a_file_that_is_no_list_of_samples_is_a_problem_after_what_could_be_read(
    tmp_path: Path, content: str, samples: int, reason: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    report = report_of(path)
    assert report["samples"] == samples and reason in report["file_problem"]
    done = check(path)
    assert done.exit_code == 1 and "PROBLEM: " in done.stdout and reason in done.stdout


def test_what_the_options_name_and_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for words, reasons in {
        (tmp_path / "no.json", "--image-folder", tmp_path / "none"): (
            "there is no file",
            "--image-folder: there is no",
        ),
        (tmp_path,): ("is a folder",),
        (tmp_path / "empty.json",): ("is an empty file",),
    }.items():
        done = check(*words)
        assert isinstance(done.exception, SteeringError)
        assert all(reason in str(done.exception) for reason in reasons)


def test_the_template_and_the_aspect_ratio_are_those_of_the_training(folder: Path, tiny: TinyLlava) -> None:
    assert report_of(tiny.captions, "--image_folder", tiny.images, "--version", "plain")["bad"] == 0
    assert report_of(tiny.data, "--version", "plain")["kinds"].keys() == {"order", "image_marks"}
    data = write_data(folder, [pictured("3x40.png"), pictured("3x1.png")], "sizes.json")
    images = ("--image-folder", folder / "images")
    assert [each["index"] for each in report_of(data, *images)["problems"]] == [1]
    square = report_of(data, *images, "--image_aspect_ratio", "square")
    assert [each["index"] for each in square["problems"]] == [1]


class Killed(Checker):
    """Kills its process, as the kernel does where memory ends."""

    def check(self, sample: Any) -> Finding:
        os._exit(9)


def test_a_process_that_is_killed_is_one_error(tiny: TinyLlava) -> None:
    with pytest.raises(DataError, match="a process was killed while it checked samples 0 and later ones"):
        data_check.check_data(str(tiny.data), Killed(SampleChecks(None), False), processes=2)


def test_the_first_problems_of_each_kind_are_kept(tmp_path: Path) -> None:
    report = DataReport("data.json", keep=2)
    checker = Checker(SampleChecks(None), False)
    for _ in range(5):
        report.add(checker.check(None))
        report.add(checker.check({}))
    assert report.kinds == {"not_an_object": 5, "no_turns": 5}
    assert [problem.index for problem in report.problems] == [0, 1, 2, 3]


def test_percentiles_are_lengths_that_occur() -> None:
    report = DataReport("data.json")
    report.lengths.extend(range(200, 0, -1))
    assert report.percentiles() == {"50": 100, "90": 180, "95": 190, "99": 198}
    assert DataReport("data.json").percentiles() == {}


def test_in_a_process_of_its_own_standard_output_is_json_alone(
    folder: Path, library_forks: Forks, tiny: TinyLlava, patched_llava: Path
) -> None:
    done = library_forks.run(
        *("-m", "llava_steering_plugin", "check-data", str(folder / "data.json"), "--json"),
        *("--image-folder", str(folder / "images"), "--model_name_or_path", str(tiny.llava), "--processes", "2"),
        cwd=folder,
        env=subprocess_environment(patched_llava),
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["bad"] == len(BAD)
    assert "100%" in done.stderr and "Traceback" not in done.stderr
