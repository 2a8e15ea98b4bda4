"""List the papers' tables: which benchmarks are in them, which number of each, and what was published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError

FIGURES = Path(__file__).with_name("figures.json")
DATA_PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks-data.md"
SHORT, SENTENCE = 16, 256  # tokens of the longest answer


@dataclass(frozen=True)
class Entry:
    """One benchmark of the tables.

    Attributes:
        label: how the tables head its column.
        split: which one is scored here.
        metric: group and name of the number, as `llava-steering score` has them; None: a judge decides.
        tokens: of the longest answer.
        folders: names of its folder below --data, the first that is there.
        remark: where it differs from what was published.
    """

    label: str
    split: str
    metric: tuple[str, str] | None = ("all", "accuracy")
    tokens: int = SHORT
    folders: tuple[str, ...] = ()
    remark: str = ""


_SERVER = "published figures are of test-dev, which its server scores; here val"
ENTRIES: Mapping[str, Entry] = {
    "vqav2": Entry("VQAv2", "val", remark=_SERVER),
    "gqa": Entry("GQA", "testdev"),
    "vizwiz": Entry("VizWiz", "val", remark=_SERVER),
    "scienceqa_img": Entry("SQA-IMG", "test", folders=("scienceqa_img", "scienceqa")),
    "textvqa": Entry(
        "TextVQA", "val", remark="LLaVA's published figures are with OCR tokens in the prompt; here without"
    ),
    "pope": Entry("POPE", "test", ("all", "mean f1")),
    "mme": Entry("MME", "test", ("perception", "score"), remark="perception alone"),
    "mmvet": Entry("MM-Vet", "test", None, SENTENCE),
    "okvqa": Entry("OK-VQA", "val"),
    "iconqa_text": Entry("IconQA-txt", "test", folders=("iconqa_text", "iconqa")),
    "iconqa_blank": Entry("IconQA-blank", "test", folders=("iconqa_blank", "iconqa")),
    "flickr30k": Entry("Flickr30k", "test", ("all", "cider"), SENTENCE, remark="CIDEr"),
    "hallusionbench": Entry("HallusionBench", "test", None, SENTENCE),
    "hellaswag": Entry("HellaSwag", "val", remark="letters are read; the official code compares likelihoods"),
    "mmlu": Entry("MMLU", "test", remark="letters are read; the official code compares likelihoods"),
    "vsr": Entry("VSR", "test"),
    "snli_ve": Entry("SNLI-VE", "test"),
    "cifar10": Entry("CIFAR-10", "test"),
    "cifar100": Entry("CIFAR-100", "test"),
    "mnist": Entry("MNIST", "test"),
}
# What the papers also have, and this package cannot run.
LACKING = {
    "MMMU": "Parquet files: answer it with lmms-eval, then `llava-steering score mmmu`",
    "MMHal-Bench, CHAIR": "in the MoReS authors' code; neither is read nor scored here",
    "GSM8K": "in the MoReS authors' code; neither is read nor scored here",
}
TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "llava": (
        "LLaVA-1.5's benchmarks; MoReS' visual instruction tuning is a part of them",
        ("vqav2", "gqa", "vizwiz", "scienceqa_img", "textvqa", "pope", "mme", "mmvet"),
    ),
    "tasks": (
        "MoReS (arXiv 2412.12359), tuned for one task at a time",
        ("vqav2", "okvqa", "vizwiz", "scienceqa_img", "iconqa_text", "iconqa_blank", "flickr30k"),
    ),
    "hallucination": ("MoReS, hallucination", ("pope", "hallusionbench")),
    "text": ("MoReS, text alone", ("hellaswag", "mmlu")),
    "mixlora": (
        "MixLoRA (arXiv 2402.15896)",
        ("mme", "textvqa", "vsr", "snli_ve", "cifar10", "cifar100", "mnist", "pope"),
    ),
}


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        table: one of `TABLES`.
        model: whose row it is.
        values: by benchmark.
        source: where the figures stand.
        checked: with what they were compared after they had been copied; empty: with nothing.
    """

    table: str
    model: str
    values: Mapping[str, float]
    source: str
    checked: str = ""


def read_figures(file: Path) -> list[Published]:
    """Return the published rows of a file like figures.json.

    Raises:
        ArgumentsError: it cannot be read, or rows are not as they should be (all named).
    """
    try:
        rows = json.loads(file.read_text())["rows"]
        found = [Published(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentsError(
            f'{file} has no published figures: {error}. It should hold {{"rows": [{{"table", "model", "values", '
            f'"source"}}]}}, as {FIGURES.name} beside this program does.'
        ) from error
    if problems := [problem for row in found for problem in _problems(row)]:
        raise ArgumentsError(f"{file}: {'; '.join(problems)}.")
    return found


def _problems(row: Published) -> list[str]:
    """Return everything wrong with a published row, of which a file may say anything."""
    table, model, values, source, checked = vars(row).values()
    found = [] if isinstance(model, str) else [f"the model {model!r} is no name"]
    if not isinstance(table, str) or table not in TABLES:
        found.append(f"{model}: no table {table!r}; there are {', '.join(TABLES)}")
    if not isinstance(source, str) or not source:
        found.append(f"{model}: it names no source")
    if not isinstance(checked, str):
        found.append(f"{model}: checked is {checked!r}, which is no text")
    if not isinstance(values, dict):
        return [*found, f"{model}: its values are no numbers by benchmark"]
    found += [f"{model}: no benchmark {task!r}" for task in values if task not in ENTRIES]
    return found + [
        f"{model}: {task} is {value!r}, which is no number"
        for task, value in values.items()
        if not isinstance(value, int | float) or isinstance(value, bool)
    ]


def where_to_get(task: str) -> str:
    """Return where a benchmark's data is, and what its folder holds, from docs/benchmarks-data.md."""
    for line in DATA_PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and f"`{task}`" in cells[0]:
            page = re.sub(r"\[([^]]*)\]\(([^)]*)\)", r"\1 (\2)", cells[2])
            return f"{page}; {cells[4].replace('`', '')}"
    raise ArgumentsError(f"{DATA_PAGE} has no line on {task}.")


def value_of(task: str, scores: Mapping[str, Any]) -> float | None:
    """Return the table's number of a benchmark from what `llava-steering score` found; None: there is none."""
    metric = ENTRIES[task].metric
    if metric is None:
        return None
    value = scores["metrics"].get(metric[0], {}).get(metric[1])
    return None if value is None else float(value)


def shown_tables(tasks: Sequence[str]) -> list[str]:
    """Return the tables that have any of the benchmarks."""
    return [name for name, (_, columns) in TABLES.items() if set(columns) & set(tasks)]
