"""Run the demo: upstream's own stages make a small LLaVA, a camera breaks its colours, and MoReS teaches it again.

scripts/demo.sh sets everything up and starts it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import commands, comparing, diagnosis, scoring, world
from experiments.base import Base, build
from experiments.comparing import Compared, Data, write_file
from experiments.demo import report
from experiments.demo.settings import FULL, MAIN, QUICK, Settings
from experiments.program import OUTPUT, OutputOption, QuickOption, described, runner_of
from experiments.settings import CAMERA, SEED
from experiments.stages import Context, Done, Runner, Stage

PACKAGES = ("llava-steering-plugin", "llava-torch", "torch", "transformers", "tokenizers", "peft", "numpy", "pillow")

# What the chat is asked, and what the attention is drawn for.
ASKED, ASKED_IMAGE = "what color is the shape?", "test/0.png"

Work = Callable[[Context], dict[str, Any]]


def main(output: OutputOption = OUTPUT, quick: QuickOption = False) -> None:
    """Build a small LLaVA on easy-VQA, shift its camera's colours, and teach them with MoReS."""
    with runner_of("demo", output, quick) as runner:
        results = run(QUICK if quick else FULL, runner)
    found = runner.root / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    report.plot(results, found.with_suffix(".png"))
    console = runner.console
    console.print(report.table(results))
    console.print(comparing.table_of(results["comparison"]))
    console.print(f"Asked in upstream's chat: {results['chat']['question']!r}. Answer: {results['chat']['answer']!r}")
    console.print(report.attention(results))
    console.print(f"[bold]{found}[/bold] and results.png beside it")
    tables = runner.root / comparing.OUTPUT / "results.md"
    console.print(f"[bold]{tables}[/bold] compares the tunings: differences, costs, learning rates")
    console.print(f"[bold]{runner.root / 'diagnosis' / diagnosis.REPORT}[/bold] shows what the models attend to")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json."""
    started = time.monotonic()
    base = build(settings.base, runner)
    shifted = base.data.folder / "pictures" / "shifted"
    counts = {"validation": settings.validation, "test": settings.questions}
    asked = runner.run(Stage("questions", counts, (), _questions(counts), (world, scoring)))
    compared = _compare(settings, base, asked, shifted, runner)
    main = compared.adapters[MAIN.slug]
    answered = runner.run_side_by_side(
        [
            Stage(
                f"eval-{name}-{camera}",
                {"camera": camera, "cell": compared.cells[MAIN.slug] if model == main else None},
                (asked, base.data, base.done),
                _evaluation(asked, base.data, camera, model),
                (scoring, commands),
            )
            for name, camera, model in (
                ("base", "clean", base.model),
                ("base", "shifted", base.model),
                (MAIN.slug, "shifted", main),
            )
        ]
    )
    chat = runner.run(Stage("chat", {"cell": compared.cells[MAIN.slug]}, (base.done,), _chat(base, main)))
    measured = {"base": base.model} | {slug: compared.adapters[slug] for slug in settings.diagnosed}
    diagnosed = runner.run(
        Stage(
            "diagnosis",
            {"cells": [compared.cells[slug] for slug in settings.diagnosed], "samples": settings.diagnosis},
            (asked, base.data, base.done),
            _diagnosis(asked, shifted, measured, settings.diagnosis),
            (diagnosis,),
        )
    )
    names = (("base", "clean"), ("base", "shifted"), (MAIN.name, "shifted"))
    rows = [
        {"model": name, "camera": camera, **evaluation.values}
        for (name, camera), evaluation in zip(names, answered, strict=True)
    ]
    stages = (*base.stages, asked, *answered, chat, diagnosed)
    return {
        "questions": settings.questions,
        "rows": rows,
        "comparison": compared.document,
        "chat": chat.values,
        "attention_to_image": diagnosed.values["image_shares"],
        "tower_accuracy": base.tower.values,
        "seconds": {done.folder.name: done.seconds for done in stages},
        "seed": SEED,
        "camera": list(CAMERA),
        **described(PACKAGES, started),
    }


def _compare(settings: Settings, base: Base, asked: Done, shifted: Path, runner: Runner) -> Compared:
    """Compare all tunings: each kind of question is a test of its own."""
    files = {
        split: {kind: asked.folder / _file(split, kind) for kind in world.KINDS} for split in ("validation", "test")
    }
    data = Data("shifted camera", base.data.folder / "train.json", shifted, files["validation"], files["test"])
    file = runner.root / "compare.yaml"
    lengths = {"steps": settings.shift_steps, "batch": settings.base.batch}
    write_file(file, base, data, settings.tunings, **lengths, seeds=[SEED])
    return comparing.run(file, settings.tunings, runner)


def _file(split: str, kind: str) -> str:
    return f"{split}-{kind.replace('/', '-')}.jsonl"


def _questions(counts: Mapping[str, int]) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        halves = world.halves(world.Split.load("test").questions)
        for (split, count), questions in zip(counts.items(), halves, strict=True):
            sample = [
                scoring.Asked(f"test/{one.image}.png", one.text, one.answer, one.kind)
                for one in world.test_sample(questions, count)
            ]
            scoring.write_questions(stage.folder / f"{split}.jsonl", sample)
            for kind in world.KINDS:
                own = (one for one in sample if one.kind == kind)
                scoring.write_questions(stage.folder / _file(split, kind), own)
        return {}

    return work


def _evaluation(asked: Done, data: Done, camera: str, model: Path) -> Work:
    """Answer the test with upstream's own evaluation."""

    def work(stage: Context) -> dict[str, Any]:
        answers, questions = stage.folder / "answers.jsonl", asked.folder / "test.jsonl"
        stage.run(commands.evaluate(answers, model, data.folder / "pictures" / camera, questions))
        return dict(scoring.accuracy(answers, questions))

    return work


def _diagnosis(asked: Done, pictures: Path, models: Mapping[str, Path], samples: int) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        questions = asked.folder / "test.jsonl"
        diagnosis.modality(stage, models, questions, pictures, samples)
        diagnosis.steering(stage, {MAIN.slug: models[MAIN.slug]}, questions, pictures, samples)
        diagnosis.image(stage, MAIN.slug, models[MAIN.slug], pictures / ASKED_IMAGE, ASKED)
        diagnosis.report(stage)
        return {"image_shares": diagnosis.image_shares(stage)}

    return work


def _chat(base: Base, adapter: Path) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        picture = base.data.folder / "pictures" / "shifted" / ASKED_IMAGE
        said = stage.run(commands.chat(adapter, picture), say=f"{ASKED}\n\n")
        answer = said.partition("ASSISTANT: ")[2].partition("USER: ")[0].strip()
        return {"question": ASKED, "image": f"shifted/{ASKED_IMAGE}", "answer": answer.removesuffix("</s>")}

    return work
