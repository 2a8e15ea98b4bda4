"""`llava-steering prepare`: LLaVA's files of every benchmark, checked; the way from there to a score of 100.

Covers `cli/prepare.py`, `evaluation/preparing.py`, `evaluation/layouts/registry.py`, `evaluation/layouts/vqa.py`,
`evaluation/layouts/choices.py`, `evaluation/layouts/scenes.py`, `evaluation/layouts/instructions.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_folders import write_answers
from official_sources import MAKERS, make_source
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError, DataError, SteeringError
from llava_steering_plugin.evaluation.layouts.registry import LAYOUTS
from llava_steering_plugin.evaluation.preparing import prepare
from llava_steering_plugin.evaluation.scoring import score
from llava_steering_plugin.training.data.sample_checks import SampleChecks

# The split that is scored, and what `score` takes as its annotations.
SCORED = {
    "vqav2": ("val", "v2_mscoco_val2014_annotations.json", "accuracy"),
    "okvqa": ("val", "mscoco_val2014_annotations.json", "accuracy"),
    "textvqa": ("val", "", "accuracy"),
    "vizwiz": ("val", "", "accuracy"),
    "gqa": ("testdev", "", "accuracy"),
    "scienceqa": ("test", "", "accuracy"),
    "scienceqa_img": ("test", "", "accuracy"),
    "iconqa_text": ("test", "", "anls"),
    "iconqa_blank": ("test", "", "accuracy"),
    "pope": ("test", "", "accuracy"),
    "vsr": ("test", "", "accuracy"),
    "snli_ve": ("test", "", "accuracy"),
    "hellaswag": ("val", "", "accuracy"),
    "mmlu": ("test", "", "accuracy"),
    "vision_flan": ("train", "", "accuracy"),
    "cifar10": ("test", "", "accuracy"),
    "cifar100": ("test", "", "accuracy"),
    "mnist": ("test", "t10k-labels-idx1-ubyte", "accuracy"),
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", LAYOUTS)
def test_every_split_becomes_data_that_llava_can_be_trained_on(task: str, tmp_path: Path) -> None:
    source = make_source(task, tmp_path / "official")
    splits = [split for split in LAYOUTS[task].splits if (task, split) not in EMPTY]
    for split in splits:
        made = prepare(task, source, tmp_path / "data", split=split)
        questions = lines(made.questions)
        assert len(questions) == made.entries == made.whole > 0
        checks = SampleChecks(str(tmp_path / "data" / "images"))
        if made.samples is None:
            assert split == "test"
            continue
        samples = json.loads(made.samples.read_text())
        assert [checks.of(sample, whole=True) for sample in samples] == [[]] * len(questions)
        assert all(sample["task"].startswith("task" if task == "vision_flan" else task) for sample in samples)
        for question, sample in zip(questions, samples, strict=True):
            assert question.get("image") == sample.get("image")
            assert sample["conversations"][0]["value"].removeprefix("<image>\n") == question["text"]
            assert "<image>" not in question["text"]  # `eval` adds it
    assert not list((tmp_path / "data").glob("*.partial")) and not list((tmp_path / "data").glob(".*"))


# Splits that the tiny sources lack.
EMPTY = {
    *((task, "val") for task in ("scienceqa", "scienceqa_img", "iconqa_text", "iconqa_blank", "flickr30k")),
    *(("flickr30k", "test"), ("gqa", "test"), ("hellaswag", "test")),
}


@pytest.mark.parametrize("task", SCORED)
def test_right_answers_to_the_question_file_have_the_full_score(task: str, tmp_path: Path) -> None:
    split, annotations, metric = SCORED[task]
    source = make_source(task, tmp_path / "official")
    made = prepare(task, source, tmp_path / "data", split=split)
    assert made.samples is not None
    learned = [sample["conversations"][1]["value"] for sample in json.loads(made.samples.read_text())]
    asked = lines(made.questions)
    answers = [(each["question_id"], said, each["text"]) for each, said in zip(asked, learned, strict=True)]
    file = write_answers(tmp_path / "a.jsonl", answers)
    assert score(task, file, source / annotations).metrics["all"][metric] == pytest.approx(100)


def test_mmes_right_answers_have_the_full_score(tmp_path: Path) -> None:
    source = make_source("mme", tmp_path / "official")
    made = prepare("mme", source, tmp_path / "data")
    answers = [
        (each["question_id"], ("Yes", "No")[n % 2], each["text"]) for n, each in enumerate(lines(made.questions))
    ]
    found = score("mme", write_answers(tmp_path / "a.jsonl", answers), source).metrics
    assert found["perception"] == {"score": 400.0, "questions": 4}


@pytest.mark.parametrize("task", ["mmvet", "hallusionbench"])
def test_a_judges_questions_have_ids_that_its_submission_takes(task: str, tmp_path: Path) -> None:
    source = make_source(task, tmp_path / "official")
    made = prepare(task, source, tmp_path / "data")
    assert made.samples is None
    answers = [(each["question_id"], "x", each["text"]) for each in lines(made.questions)]
    found = score(task, write_answers(tmp_path / "a.jsonl", answers), source, submission=True)
    assert len(found.submission) == made.entries


def test_the_command_names_its_files_and_draws_the_same_subset_again(tmp_path: Path) -> None:
    source = make_source("vqav2", tmp_path / "official")

    def run(output: Path, seed: int) -> Any:
        words = ["prepare", "vqav2", "--source", source, "--output", output, "--samples", 2, "--seed", seed]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        assert f"2 of 3 questions; --image_folder {output / 'images'}" in done.stdout
        assert str(output / "vqav2_train_2.json") in done.stdout and "vqav2_train_2.jsonl" in done.stdout
        return [sample["id"] for sample in json.loads((output / "vqav2_train_2.json").read_text())]

    first = run(tmp_path / "one", 0)
    assert run(tmp_path / "two", 0) == first == sorted(first) and len(set(first)) == 2
    assert any(run(tmp_path / "one", seed) != first for seed in range(1, 6))
    assert (tmp_path / "one" / "images" / "vqav2").is_symlink()


def test_several_tasks_share_an_output_and_another_source_is_refused(tmp_path: Path) -> None:
    for task in ("gqa", "mmlu"):
        prepare(task, make_source(task, tmp_path / task), tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data" / "images").iterdir()) == ["gqa"]
    with pytest.raises(ArgumentsError, match=r"gqa .*does not lead to"):
        prepare("gqa", make_source("gqa", tmp_path / "other"), tmp_path / "data")


def test_missing_and_damaged_pictures_are_named_and_nothing_is_made(tmp_path: Path) -> None:
    source = make_source("gqa", tmp_path / "official")
    (source / "images" / "n0.jpg").unlink()
    (source / "images" / "n1.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        prepare("gqa", source, tmp_path / "data")
    text = str(caught.value)
    assert "LLaVA could not read 2 of 3 questions" in text and "nothing was made" in text
    assert "gqa-00: there is no image" in text and "gqa-01: the image" in text
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["images"]


def test_a_picture_that_questions_share_is_decoded_once_and_its_damage_counts_for_each(tmp_path: Path) -> None:
    source = make_source("pope", tmp_path / "official")
    seen: list[tuple[int, int]] = []
    prepare("pope", source, tmp_path / "data", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1, 1)
    (source / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"6 of 6 questions .*\n(.*\n)+.*and 1 more like these"):
        prepare("pope", source, tmp_path / "data")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a\\b", "a\nb", "", None, 1.5, True])
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    source = make_source("gqa", tmp_path / "official")
    file = source / "train_balanced_questions.json"
    questions = json.loads(file.read_text())
    questions["00"]["imageId"] = name
    file.write_text(json.dumps(questions))
    with pytest.raises(DataError, match=r"train_balanced_questions\.json .*is no name of a file"):
        prepare("gqa", source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("task", MAKERS)
def test_an_empty_folder_is_told_with_the_file_that_was_expected(task: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .*(json|csv|subtasks|txt|ubyte)"):
        prepare(task, tmp_path, tmp_path / "data")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("vqa", {}, "there is no layout for 'vqa': did you mean 'vqav2'"),
        ("okvqa", {"split": "test"}, "okvqa has no split 'test': it has train, val"),
        ("gqa", {"samples": 4}, "--samples 4 of 3 questions cannot be drawn"),
    ],
)
def test_what_cannot_be_prepared_is_told(task: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make_source("gqa", tmp_path / "official")
    with pytest.raises(SteeringError) as caught:
        prepare(task, source, tmp_path / "data", **options)
    assert message in str(caught.value)
    with pytest.raises(DataError, match="there is no folder"):
        prepare("gqa", tmp_path / "none", tmp_path / "data")
