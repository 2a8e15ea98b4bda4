"""What `prepare` writes becomes tasks of lmms-eval, whose numbers are those of `llava-steering score`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from official_sources import make_source, write_lines
from PIL import Image

from llava_steering_plugin.errors import DataError, SteeringError
from llava_steering_plugin.evaluation.benchmark import ALL
from llava_steering_plugin.evaluation.preparing import prepare
from llava_steering_plugin.evaluation.scoring import score
from llava_steering_plugin.harness import prepared
from llava_steering_plugin.harness.prepared import METRICS, SPLITS, pictures, read_documents, results, scored

TASKS = ("iconqa_text", "iconqa_blank", "vsr", "snli_ve", "cifar10", "cifar100", "mnist", "vision_flan")
FOLDER = Path(prepared.__file__).parent / "tasks"
# Answers of the kinds that rules read in their own ways: letters, words for labels, capitals, full stops.
SAID = ("B", "Yes.", "neutral", "Bird", "aquarium fish", "seven", "red.", "4", "five")


def ready(task: str, folder: Path, **how: Any) -> Path:
    prepare(task, make_source(task, folder / task), folder / "data", split=SPLITS.get(task, "test"), **how)
    return folder / "data"


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_numbers_are_those_of_score(task: str, tmp_path: Path) -> None:
    documents = read_documents(task, ready(task, tmp_path))
    file = tmp_path / "data" / f"{task}_{SPLITS.get(task, 'test')}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [document["text"] for document in documents] == [line["text"] for line in lines]
    for said in (*SAID, *(document["answer"] for document in documents)):
        answers = [{"question_id": line["question_id"], "text": said} for line in lines]
        write_lines(tmp_path / "answers.jsonl", answers)
        expected = score(task, tmp_path / "answers.jsonl", tmp_path / task).metrics
        items = [results(document, [said]) for document in documents]
        names = METRICS.get(task, ("accuracy",))
        assert [tuple(item) for item in items] == [names] * len(items)
        assert scored([item["accuracy"] for item in items]) == expected
        assert prepared.accuracy([item["accuracy"] for item in items]) == expected[ALL]["accuracy"]
        if "anls" in names:
            assert prepared.anls([item["anls"] for item in items]) == expected[ALL]["anls"]
    own = [results(document, [document["answer"]])["accuracy"] for document in documents]
    assert prepared.accuracy(own) == 100


@pytest.mark.parametrize("task", ["cifar10", "vsr"])
def test_the_pictures_are_those_that_eval_reads(task: str, tmp_path: Path) -> None:
    for document in read_documents(task, ready(task, tmp_path)):
        (picture,) = pictures(document)
        with Image.open(document["images"][0]) as file:
            assert picture.mode == "RGB" and picture.tobytes() == file.convert("RGB").tobytes()


def test_a_drawn_subset_is_found_and_two_files_are_one_too_many(tmp_path: Path) -> None:
    data = ready("vsr", tmp_path, samples=1)
    assert len(read_documents("vsr", data)) == 1
    ready("vsr", tmp_path)
    with pytest.raises(DataError, match=r"holds vsr_test\.jsonl and vsr_test_1\.jsonl: leave one there"):
        read_documents("vsr", data)


def test_other_splits_and_other_tasks_are_passed_over(tmp_path: Path) -> None:
    data = ready("cifar10", tmp_path)
    prepare("cifar10", tmp_path / "cifar10", data, split="train", samples=3)
    ready("cifar100", tmp_path)
    assert len(read_documents("cifar10", data)) == 2


def test_what_is_missing_damaged_or_of_another_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no mnist_test\.jsonl.*prepare mnist --source.*LLAVA_STEERING_DATA"):
        read_documents("mnist", tmp_path)
    data = ready("mnist", tmp_path)
    samples = data / "mnist_test.json"
    kept = samples.read_text()
    samples.write_text(json.dumps(json.loads(kept)[::-1]))
    with pytest.raises(DataError, match=r"mnist_test\.json does not hold the answers to mnist_test\.jsonl"):
        read_documents("mnist", data)
    samples.write_text(kept[:40])
    with pytest.raises(DataError, match=r"mnist_test\.json is damaged"):
        read_documents("mnist", data)
    samples.unlink()
    with pytest.raises(DataError, match=r"mnist_test\.json cannot be read"):
        read_documents("mnist", data)
    samples.write_text(kept)
    (data / "images" / "mnist" / "t10k" / "0.png").unlink()
    with pytest.raises(SteeringError, match=r"there is no image mnist/t10k/0\.png"):
        read_documents("mnist", data)


def test_every_task_has_a_file_whose_functions_are_there() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(TASKS)
    for file in (*FOLDER.glob("*.yaml"), FOLDER / "prepared"):
        text = file.read_text()
        named = re.findall(r"!function llava_steering_plugin\.harness\.prepared\.(\w+)", text)
        assert named and all(callable(getattr(prepared, name)) for name in named)
        assert text.count("!function") == len(named)
    for task in TASKS:
        text = (FOLDER / f"{task}.yaml").read_text()
        config = yaml.safe_load(text.replace("!function ", ""))
        assert (config["task"], config["process_docs"].rpartition(".")[2]) == (task, task)
        common = yaml.safe_load((FOLDER / "prepared").read_text().replace("!function ", ""))
        listed = config.get("metric_list", common["metric_list"])
        assert tuple(each["metric"] for each in listed) == METRICS.get(task, ("accuracy",))
    assert (FOLDER / "placeholder.txt").read_text().strip()
