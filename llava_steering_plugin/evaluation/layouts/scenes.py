"""GQA, POPE, MME, VSR, SNLI-VE, MM-Vet and HallusionBench: questions and statements about scenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.layouts.entry import SHORT, Entry, asked, file_name
from llava_steering_plugin.evaluation.official_files import official, read_json, read_lines, reading, text_of
from llava_steering_plugin.evaluation.scores.mme import ASKS, COGNITION, PERCEPTION

POPE_SPLITS = ("random", "popular", "adversarial")
PICTURES = (".jpg", ".png")


def gqa(source: Path, split: str) -> Iterator[Entry]:
    """Yield GQA's balanced questions about images in images."""
    path = official(source, f"{split}_balanced_questions.json")
    questions = read_json(path, dict, "an object of questions by id")
    with reading(path):
        for key, question in questions.items():
            said = text_of(question, "answer") if "answer" in question else None
            image = f"images/{file_name(question['imageId'])}.jpg"
            yield Entry(key, asked(text_of(question, "question"), SHORT), said, image)


def pope(source: Path, split: str) -> Iterator[Entry]:
    """Yield POPE's questions about COCO's images in val2014; random, popular and adversarial ones, or one of them."""
    for name in POPE_SPLITS if split == "test" else (split,):
        path = official(source, f"coco_pope_{name}.json", f"coco/coco_pope_{name}.json")
        lines = read_lines(path)
        with reading(path):
            for line in lines:
                image, label = f"val2014/{file_name(line['image'])}", text_of(line, "label").capitalize()
                question = asked(text_of(line, "text"), SHORT)
                yield Entry(f"{name}/{line['question_id']}", question, label, image, category=name)


def mme(source: Path, split: str) -> Iterator[Entry]:
    """Yield MME's questions; images lie beside the texts or in `images`."""
    found = False
    for subtask in (*PERCEPTION, *COGNITION):
        folder = source / subtask
        apart = (folder / "questions_answers_YN").is_dir()
        for file in sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt")):
            found = True
            where = folder / "images" if apart else folder
            names = [file.stem + ending for ending in PICTURES if (where / (file.stem + ending)).is_file()]
            if not names:
                raise DataError(f"{where} holds no picture {file.stem}.jpg or .png for {file}.")
            with reading(file):
                for line in file.read_text(encoding="utf-8-sig").splitlines():
                    if not line.strip():
                        continue
                    question, answer = line.split("\t")
                    key = f"{subtask}/{names[0]}"
                    text = asked(question.replace(ASKS, ""), SHORT)
                    image = f"{subtask}/images/{names[0]}" if apart else key
                    yield Entry(key, text, answer.strip(), image, category=subtask)
    if not found:
        raise DataError(f"{source} holds no subtasks with questions. Is it MME_Benchmark_release_version?")


def vsr(source: Path, split: str) -> Iterator[Entry]:
    """Yield VSR's statements about images in images, of the random split or the zero-shot one."""
    kind, _, part = split.rpartition("_")
    plain = () if kind else (f"{split}.jsonl",)
    path = official(source, f"splits/{kind or 'random'}/{part}.jsonl", *plain)
    lines = read_lines(path)
    with reading(path):
        for number, line in enumerate(lines):
            said = ("False", "True")[int(line["label"])]
            question = asked(f"Is this true or false? {text_of(line, 'caption')}", SHORT)
            yield Entry(number, question, said, f"images/{file_name(line['image'])}")


def snli_ve(source: Path, split: str) -> Iterator[Entry]:
    """Yield SNLI-VE's pairs about Flickr30k's images in flickr30k-images."""
    path = official(source, f"snli_ve_{split}.jsonl")
    lines = read_lines(path)
    with reading(path):
        for line in lines:
            question = asked(
                f"Statement: {text_of(line, 'sentence2')}",
                "Does the image entail the statement, contradict it, or neither? "
                "Answer with entailment, contradiction or neutral.",
            )
            number = (
                line["Flikr30kID"] if "Flikr30kID" in line else line["Flickr30K_ID"]
            )  # its first release's spelling
            image = f"flickr30k-images/{file_name(number)}.jpg"
            yield Entry(line["pairID"], question, text_of(line, "gold_label"), image)


def mmvet(source: Path, split: str) -> Iterator[Entry]:
    """Yield MM-Vet's questions about images in images; a judge scores the answers, so none is learned."""
    path = official(source, "mm-vet.json")
    questions = read_json(path, dict, "an object of questions by id")
    with reading(path):
        for key, question in questions.items():
            image = f"images/{file_name(question['imagename'])}"
            yield Entry(key, asked(text_of(question, "question")), None, image)


def hallusionbench(source: Path, split: str) -> Iterator[Entry]:
    """Yield HallusionBench's questions about images in hallusion_bench, some about none."""
    path = official(source, "HallusionBench.json")
    entries = read_json(path, list, "a list of questions")
    with reading(path):
        for entry in entries:
            category, part = file_name(entry["category"]), file_name(entry["subcategory"])
            figure = f"{file_name(entry['set_id'])}_{file_name(entry['figure_id'])}"
            pictured = str(entry["visual_input"]) != "0"
            image = f"hallusion_bench/{category}/{part}/{figure}.png" if pictured else None
            yield Entry(
                f"{category}/{part}/{figure}_{entry['question_id']}", asked(text_of(entry, "question")), None, image
            )
