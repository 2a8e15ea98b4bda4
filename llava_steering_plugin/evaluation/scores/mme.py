"""MME: yes or no about each of two questions on an image, in fourteen subtasks.

A subtask's score is its accuracy plus acc+, the share of images with both answers right, in percent: 200 at most.
Perception is the sum of ten subtasks, cognition of four. Source: MME (arXiv 2306.13394, the evaluation tool of
github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import GivenAnswer, Metrics, Pair, Points, References, Wanted
from llava_steering_plugin.evaluation.official_files import reading

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKS = "Please answer yes or no."
LLAVA_ASKS = "Answer the question using a single word or phrase."
LOOKED_AT = 4  # the first characters of an answer, in which yes or no is looked for


def verdict(text: str) -> str:
    """Return yes, no or other: what the first characters of an answer say."""
    start = text.lower()[:LOOKED_AT]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_mme(source: Path, wanted: Wanted) -> References:
    """Read MME's release: a folder for each subtask, and in it a text file for each image, of two questions.

    The id is SUBTASK/IMAGE, as LLaVA has it, and shared by the two; the prompt tells which of them is meant.

    Raises:
        DataError: the folder lacks the subtasks, or a file is of another layout.
    """
    items: dict[str, dict[str, str]] = {}
    for subtask in (*PERCEPTION, *COGNITION):
        folder = source / subtask
        texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
        for file in sorted(texts.glob("*.txt")):
            with reading(file):
                lines = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
                if len(lines) != 2 or any(len(line) != 2 for line in lines):
                    raise ValueError("it should hold two lines of a question, a tab and Yes or No")
                for question, answer in lines:
                    right = answer.strip().lower()
                    if right not in ("yes", "no"):
                        raise ValueError(f"its answer {answer!r} is neither Yes nor No")
                    image = f"{subtask}/{file.stem}"
                    items[_key(image, question)] = {"subtask": subtask, "image": image, "right": right}
    if not items:
        raise DataError(f"{source} holds no subtasks with questions. Is it MME_Benchmark_release_version?")

    def find(answer: GivenAnswer) -> str | None:
        path = PurePosixPath(answer.id)
        key = _key(f"{path.parent}/{path.stem}", answer.prompt)
        return key if key in items else None

    return References(items, find=find)


def _key(image: str, question: str) -> str:
    """Return the key of a question: the image, and what is asked without the call for a short answer."""
    asked = question.replace(LLAVA_ASKS, "").replace(ASKS, "")
    return f"{image}: {' '.join(asked.split())}"


def mme_points(pairs: Sequence[Pair]) -> Points:
    """Tell which questions are answered right. Their mean over a subtask is its accuracy; acc+ is of images."""
    return {pair.key: float(verdict(pair.text) == pair.reference["right"]) for pair in pairs}


def mme_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the sums for perception and cognition, and accuracy, acc+ and score of each subtask."""
    metrics: Metrics = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        of_subtask = {
            subtask: members
            for subtask in subtasks
            if (members := [pair for pair in pairs if pair.reference["subtask"] == subtask])
        }
        rows = {subtask: _subtask(members) for subtask, members in of_subtask.items()}
        if rows:
            total = sum(float(row["score"] or 0) for row in rows.values())
            asked = sum(len(members) for members in of_subtask.values())
            metrics |= {name: {"score": total, "questions": asked}, **rows}
    return metrics


def _subtask(pairs: Sequence[Pair]) -> dict[str, float | int | None]:
    points = mme_points(pairs)
    right: dict[str, list[float]] = {}
    for pair in pairs:
        right.setdefault(pair.reference["image"], []).append(points[pair.key])
    accuracy = 100 * sum(points.values()) / len(pairs)
    both = 100 * sum(sum(each) == 2 for each in right.values()) / len(right)
    other = sum(verdict(pair.text) == "other" for pair in pairs)
    return {"score": accuracy + both, "accuracy": accuracy, "acc+": both, "other": other, "questions": len(pairs)}
