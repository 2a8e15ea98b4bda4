"""Run the demo: upstream's own stages make a small LLaVA, a camera breaks its colours, and MoReS teaches it again.

scripts/demo.sh sets everything up and starts it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import commands, diagnosis, scoring, world
from experiments.base import Base, build
from experiments.demo import report
from experiments.demo.settings import FULL, MAIN, QUICK, Settings
from experiments.program import OUTPUT, OutputOption, QuickOption, described, runner_of
from experiments.settings import CAMERA, SEED
from experiments.stages import Context, Done, Runner, Stage
from experiments.tuning import Lengths, tuning_stage

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
    console.print(f"Asked in upstream's chat: {results['chat']['question']!r}. Answer: {results['chat']['answer']!r}")
    console.print(report.attention(results))
    console.print(f"[bold]{found}[/bold] and results.png beside it")
    console.print(f"[bold]{runner.root / 'diagnosis' / diagnosis.REPORT}[/bold] shows what the models attend to")


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
    measured = {"base": base.model} | {
        tuning.slug: tuning.adapter(done.folder)
        for tuning, done in zip(settings.tunings, tuned, strict=True)
        if tuning in settings.diagnosed
    }
    diagnosed = runner.run(
        Stage(
            "diagnosis",
            {"models": list(measured), "samples": settings.diagnosis},
            (test, base.data, base.done, *tuned),
            _diagnosis(test, shifted, measured, settings.diagnosis),
            (diagnosis,),
        )
    )
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
    stages = (*base.stages, *tuned, test, *answered, chat, diagnosed)
    return {
        "questions": settings.questions,
        "rows": rows,
        "chat": chat.values,
        "attention_to_image": diagnosed.values["image_shares"],
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


def _diagnosis(test: Done, pictures: Path, models: Mapping[str, Path], samples: int) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        questions = test.folder / "questions.jsonl"
        diagnosis.modality(stage, models, questions, pictures, samples)
        diagnosis.steering(stage, {MAIN.slug: models[MAIN.slug]}, questions, pictures, samples)
        diagnosis.image(stage, models[MAIN.slug], pictures / ASKED_IMAGE, ASKED)
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
