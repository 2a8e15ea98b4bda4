"""Run the demo: upstream's own stages make a small LLaVA, a camera breaks its colours, and MoReS teaches it again.

scripts/demo.sh sets everything up and starts it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import commands, scoring, world
from experiments.base import Base, build
from experiments.demo import report
from experiments.demo.settings import FULL, QUICK, Settings
from experiments.program import OUTPUT, OutputOption, QuickOption, described, runner_of
from experiments.settings import CAMERA, SEED
from experiments.stages import Context, Done, Runner, Stage
from experiments.tuning import Lengths, tuning_stage

PACKAGES = ("llava-steering-plugin", "llava-torch", "torch", "transformers", "tokenizers", "peft", "numpy", "pillow")

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
    console.print(f"Asked in upstream's chat: {results['chat']['question']!r}. Answer: {results['chat']['answer']!r}")
    console.print(f"[bold]{found}[/bold] and results.png beside it")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json."""
    started = time.monotonic()
    base = build(settings.base, runner)
    lengths = Lengths(settings.shift_steps, settings.base.batch)
    shifted = base.data.folder / "pictures" / "shifted"
    tuned = runner.run_side_by_side(
        [tuning_stage(f"shift-{tuning.slug}", tuning, lengths, base, base.data, shifted) for tuning in settings.tunings]
    )
    test = runner.run(Stage("questions", {"count": settings.questions}, (), _questions(settings), (world, scoring)))
    asked: list[tuple[str, Done, Path, Path | None]] = [
        ("clean", base.done, base.model, None),
        ("shifted", base.done, base.model, None),
    ]
    for tuning, done in zip(settings.tunings, tuned, strict=True):
        asked.append(("shifted", done, tuning.adapter(done.folder), base.model if tuning.is_lora else None))
    answered = runner.run_side_by_side(
        [
            Stage(
                f"eval-{path.name}-{camera}",
                {"camera": camera},
                (test, base.data, done),
                _evaluation(test, base.data, camera, path, lora_base),
                (scoring,),
            )
            for camera, done, path, lora_base in asked
        ]
    )
    chat = runner.run(Stage("chat", {}, (tuned[0],), _chat(base, asked[2][2])))
    names = ["base", "base", *(tuning.name for tuning in settings.tunings)]
    trained = [None, None, *tuned]
    rows = [
        {
            "model": name,
            "camera": camera,
            "parameters": done.values["parameters"] if done else None,
            "train_seconds": done.seconds if done else None,
            **evaluation.values,
        }
        for name, (camera, *_), done, evaluation in zip(names, asked, trained, answered, strict=True)
    ]
    stages = (*base.stages, *tuned, test, *answered, chat)
    return {
        "questions": settings.questions,
        "rows": rows,
        "chat": chat.values,
        "tower_accuracy": base.tower.values,
        "seconds": {done.folder.name: done.seconds for done in stages},
        "seed": SEED,
        "camera": list(CAMERA),
        **described(PACKAGES, started),
    }


def _questions(settings: Settings) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        sample = world.test_sample(world.Split.load("test").questions, settings.questions)
        scoring.write_questions(
            stage.folder,
            (scoring.Asked(f"test/{one.image}.png", one.text, one.answer, one.kind) for one in sample),
        )
        return {}

    return work


def _evaluation(test: Done, data: Done, camera: str, model: Path, lora_base: Path | None) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        answers, pictures = stage.folder / "answers.jsonl", data.folder / "pictures" / camera
        stage.run(commands.evaluate(answers, model, lora_base, pictures, test.folder / "questions.jsonl"))
        return dict(scoring.accuracy(answers, test.folder / "answers.json", world.KINDS))

    return work


def _chat(base: Base, adapter: Path) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        question, image = "what color is the shape?", "test/0.png"
        picture = base.data.folder / "pictures" / "shifted" / image
        said = stage.run(commands.chat(adapter, picture), say=f"{question}\n\n")
        answer = said.partition("ASSISTANT: ")[2].partition("USER: ")[0].strip()
        return {"question": question, "image": f"shifted/{image}", "answer": answer.removesuffix("</s>")}

    return work
