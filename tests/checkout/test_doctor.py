"""`llava-steering doctor` (`cli/checkout.py`): what it finds, and which commands a missing name stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_checkout import add_distribution, run_python

from llava_steering_plugin.checkout.doctor import examine
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.checkout.patch import patch
from llava_steering_plugin.upstream.seams import SEAMS

EVERYWHERE = ["chat", "eval", "serve", "diagnose"]


@pytest.fixture
def copy(pristine_llava: Path, tmp_path: Path) -> Path:
    """A copy of the real llava that a test may change."""
    shutil.copytree(pristine_llava / "llava", tmp_path / "LLaVA" / "llava")
    return tmp_path / "LLaVA"


def test_the_report_names_llava_its_state_the_seams_the_packages_and_the_devices(copy: Path) -> None:
    report = examine(copy)
    assert report.problems == []
    assert report.llava is not None
    assert (report.llava.path, report.llava.state) == (str(copy / "llava"), "not patched")
    assert len(report.seams) == len(SEAMS) and all(seam.found for seam in report.seams)
    assert report.packages["torch"] and report.packages["transformers"]
    assert report.devices
    assert any("llava-steering patch" in step for step in report.next_steps)
    patch(find_llava(copy))
    patched = examine(copy)
    assert patched.llava is not None and patched.llava.state == "patched"
    assert not any("Run `llava-steering patch`" in step for step in patched.next_steps)
    assert any("--tuning_mode mores" in step for step in patched.next_steps)


def test_a_trainer_that_cannot_run_stops_trainings_alone_and_the_way_on_is_named(copy: Path) -> None:
    """As in LLaVA-NeXT since 45f2d92: names are used that nothing imports."""
    trainer = copy / "llava/train/llava_trainer.py"
    trainer.write_text(trainer.read_text() + "\n\ndef loop():\n    return DebugOption\n")
    report = examine(copy)
    assert report.stopped == ["train"]
    (problem,) = report.problems
    assert "DebugOption" in problem and "git checkout b42941c -- llava/train/llava_trainer.py" in problem
    assert all(seam.found for seam in report.seams)


def test_missing_seams_are_all_reported_with_what_they_are_for_and_status_1(copy: Path) -> None:
    arch, train = copy / "llava/model/llava_arch.py", copy / "llava/train/train.py"
    renamed = arch.read_text().replace("def prepare_inputs_labels_for_multimodal", "def prepare_it_all")
    arch.write_text(renamed)
    train.unlink()
    done = run_python("-m", "llava_steering_plugin", "doctor", "--llava", str(copy), "--json", path=[], cwd=copy.parent)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    missing = [seam["name"] for seam in report["seams"] if not seam["found"]]
    assert "llava.model.llava_arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal" in missing
    assert "llava.train.train.TrainingArguments" in missing
    assert len(missing) == 1 + sum(seam.module == "llava.train.train" for seam in SEAMS)
    for name in missing:
        assert any(name in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("file", "name", "seam", "stopped"),
    [
        ("mm_utils.py", "tokenizer_image_token", "llava.mm_utils.tokenizer_image_token", EVERYWHERE),
        ("serve/model_worker.py", "get_queue_length", "ModelWorker.get_queue_length", ["serve"]),
        (
            "model/multimodal_projector/builder.py",
            "build_vision_projector",
            "build_vision_projector",
            ["train", "plan"],
        ),
        ("serve/controller.py", "__main__", "llava.serve.controller.__main__", ["serve"]),
    ],
)
def test_a_name_that_is_removed_stops_the_commands_that_need_it(
    copy: Path, file: str, name: str, seam: str, stopped: list[str]
) -> None:
    source = copy / "llava" / file
    source.write_text(source.read_text().replace(name, f"{name}_of_another_version"))
    report = examine(copy)
    assert report.stopped == stopped
    assert [found.stops for found in report.seams if not found.found] == [stopped]
    assert len(report.problems) == 1
    assert f"{seam}, which" in report.problems[0]
    assert report.problems[0].endswith(f"these do not work: {', '.join(stopped)}.")


def test_a_llava_that_this_python_cannot_parse_is_a_problem_that_names_the_file(copy: Path) -> None:
    (copy / "llava/mm_utils.py").write_text("def broken(:\n")
    problems = examine(copy).problems
    assert len(problems) == 1
    assert str(copy / "llava/mm_utils.py") in problems[0]


def test_an_edited_block_is_a_problem(copy: Path) -> None:
    llava = find_llava(copy)
    patch(llava)
    llava.init.write_text(llava.init.read_text().replace("_plugin.load()()", "pass"))
    assert any("edited" in problem for problem in examine(copy).problems)


def test_doctor_does_not_import_llava(copy: Path) -> None:
    code = (
        "import sys; from llava_steering_plugin.checkout.doctor import examine\n"
        "examine(); print('llava' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run_python("-c", code, path=[copy], cwd=copy.parent).stdout == "False False\n"


def test_as_text_nothing_is_shortened_and_every_problem_is_shown(copy: Path, tmp_path: Path) -> None:
    add_distribution(tmp_path / "stale", "llava-steering-plugin", "0.0.1")
    shutil.rmtree(copy / "llava/train")
    done = run_python("-m", "llava_steering_plugin", "doctor", path=[tmp_path / "stale", copy], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    joined = "".join(line.strip() for line in done.stdout.splitlines())
    for expected in (
        str(copy / "llava"),
        "MISSING llava.train.train.TrainingArguments",
        "found   llava.model.llava_arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal",
        "entry point  not visible",
        "llava-steering-plugin 0.0.1 in",
        "do not work  train, plan",
        "PROBLEMS",
    ):
        assert expected in joined
    assert "…" not in done.stdout


def test_without_any_llava_doctor_says_so_and_still_reports_the_rest(tmp_path: Path) -> None:
    done = run_python(
        "-m", "llava_steering_plugin", "doctor", "--json", "--llava", str(tmp_path), path=[], cwd=tmp_path
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["llava"] is None and report["packages"]["torch"]
    assert "no LLaVA in" in report["problems"][0]
