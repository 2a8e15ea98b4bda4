"""Tasks of lmms-eval over what `llava-steering prepare` writes, scored by the rules of `llava-steering score`.

The YAML files in `tasks/` name the functions of this module. They work with every model of lmms-eval.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from llava_steering_plugin.errors import DataError, SteeringError
from llava_steering_plugin.evaluation.benchmark import ALL, Metrics, Pair, Wanted
from llava_steering_plugin.evaluation.official_files import read_json, reading
from llava_steering_plugin.evaluation.preparing import IMAGES
from llava_steering_plugin.evaluation.registry import BENCHMARKS
from llava_steering_plugin.evaluation.scores.labels import label_of
from llava_steering_plugin.inference.asking.questions import Question, check_questions, read_questions
from llava_steering_plugin.inference.images import read_image
from llava_steering_plugin.pool.pool import BASE

# The environment variable that names the folder which `prepare --output` was given.
FOLDER = "LLAVA_STEERING_DATA"
# The split that is asked; of the others it is "test".
SPLITS = {"vision_flan": "train"}
METRICS = {
    "iconqa_text": ("accuracy", "anls"),
    "iconqa_blank": ("accuracy", "anls"),
    "vision_flan": ("accuracy", "rougeL"),
}


def documents(task: str, _: Any = None) -> Any:
    """Return a task's documents: lmms-eval calls it with those of a file that only stands in their place.

    Raises:
        SystemExit: they are not there, or damaged. lmms-eval would try again, print the error, and exit as if nothing
            were wrong.
    """
    from datasets import Dataset

    try:
        return Dataset.from_list(read_documents(task, Path(os.environ.get(FOLDER, "data")).expanduser()))
    except SteeringError as error:
        raise SystemExit(f"{task}: {error}") from error


def read_documents(task: str, folder: Path) -> list[dict[str, Any]]:
    """Return the questions of a benchmark as `prepare` has written them below `folder`, each with its reference.

    Raises:
        SteeringError: files are missing or damaged, or do not belong together.
    """
    split = SPLITS.get(task, "test")
    file = _question_file(task, split, folder)
    questions = read_questions(file)
    check_questions(questions, (BASE,), folder / IMAGES)
    references = _references(task, split, folder, file, questions)
    return [
        {
            "task": task,
            "key": str(question.id),
            "text": question.text,
            "images": [str(folder / IMAGES / name) for name in question.images],
            "reference": json.dumps(reference),
            "answer": reference["answer"] if isinstance(reference, dict) else reference,
        }
        for question, reference in zip(questions, references, strict=True)
    ]


def pictures(document: Mapping[str, Any]) -> list[Image.Image]:
    """Return the pictures of a document."""
    return [read_image(path) for path in document["images"]]


def results(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """Return what each metric of a document's task needs of its answer."""
    item = {"task": document["task"], "key": document["key"], "text": answers[0], "reference": document["reference"]}
    return dict.fromkeys(METRICS.get(document["task"], ("accuracy",)), item)


def accuracy(items: Sequence[Mapping[str, Any]]) -> float:
    """Return the accuracy of a task's answers, in percent."""
    return _metric(items, "accuracy")


def anls(items: Sequence[Mapping[str, Any]]) -> float:
    """Return the ANLS of a task's answers, in percent."""
    return _metric(items, "anls")


def rouge_l(items: Sequence[Mapping[str, Any]]) -> float:
    """Return the ROUGE-L of a task's answers, in percent; NaN if rouge-score is not installed."""
    return _metric(items, "rougeL")


def scored(items: Sequence[Mapping[str, Any]]) -> Metrics:
    """Return all metrics of a task's answers, as `llava-steering score` computes them."""
    metrics = BENCHMARKS[items[0]["task"]].metrics
    assert metrics is not None
    # Answers of a repeated question are apart, too.
    return metrics(
        [Pair(f"{n}/{item['key']}", json.loads(item["reference"]), item["text"]) for n, item in enumerate(items)]
    )


def _metric(items: Sequence[Mapping[str, Any]], name: str) -> float:
    found = scored(items)[ALL].get(name)
    return float("nan") if found is None else float(found)


def _question_file(task: str, split: str, folder: Path) -> Path:
    """Return the file of a split's questions, of all or of a drawn number.

    Raises:
        DataError: there is none, or there are several.
    """
    name = f"{task}_{split}"
    found = [
        path
        for path in sorted(folder.glob(f"{name}*.jsonl"))
        if path.stem.removeprefix(name).lstrip("_").isdigit() or path.stem == name
    ]
    if not found:
        raise DataError(
            f"{folder} holds no {name}.jsonl. Make it by `llava-steering prepare {task} --source DIR --output {folder} "
            f"--split {split}`, or name the folder that holds it in {FOLDER}."
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder} holds {names}: leave one there, or name another folder in {FOLDER}.")
    return found[0]


def _references(task: str, split: str, folder: Path, file: Path, questions: Sequence[Question]) -> list[Any]:
    """Return the reference of each question, as the benchmark's rule takes it.

    IconQA's choices are read from its official files, where `prepare` has left a link; what other rules need is the
    answer in the training data beside the questions.

    Raises:
        DataError: a file is missing or damaged, or of another split or subset.
    """
    if task.startswith("iconqa"):
        known = BENCHMARKS[task].read(folder / IMAGES / task, Wanted(split)).items
        if strange := [question.id for question in questions if str(question.id) not in known]:
            raise DataError(
                f"{file} asks question {strange[0]}, which the split {split} does not have. Prepare it again."
            )
        return [known[str(question.id)] for question in questions]
    samples_file = file.with_suffix(".json")
    samples = read_json(samples_file, list, "a list of samples")
    with reading(samples_file):
        if [sample["id"] for sample in samples] != [f"{task}-{question.id}" for question in questions]:
            raise DataError(f"{samples_file} does not hold the answers to {file.name}. Prepare them again.")
        return [_reference(task, sample) for sample in samples]


def _reference(task: str, sample: Mapping[str, Any]) -> Any:
    answer = str(sample["conversations"][1]["value"])
    if task == "vision_flan":
        return {"answer": answer, "task": sample["task"]}
    return answer if task == "snli_ve" else label_of(answer)


iconqa_text = partial(documents, "iconqa_text")
iconqa_blank = partial(documents, "iconqa_blank")
vsr = partial(documents, "vsr")
snli_ve = partial(documents, "snli_ve")
cifar10 = partial(documents, "cifar10")
cifar100 = partial(documents, "cifar100")
mnist = partial(documents, "mnist")
vision_flan = partial(documents, "vision_flan")
