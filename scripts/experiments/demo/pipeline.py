"""Run the demo: upstream's own stages make a small LLaVA, a camera breaks its colours, and MoReS teaches it again.

scripts/demo.sh sets everything up and starts it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import camera, commands, comparing, diagnosis, scoring
from experiments.base import Base, build
from experiments.comparing import Compared
from experiments.demo import engines, report
from experiments.demo.settings import FULL, MAIN, QUICK, Settings
from experiments.program import OUTPUT, OutputOption, QuickOption, described, runner_of
from experiments.settings import CAMERA, SEED
from experiments.stages import Context, Done, Runner, Stage

PACKAGES = ("llava-steering-plugin", "llava-torch", "torch", "transformers", "tokenizers", "peft", "numpy", "pillow")

# What the chat is asked, and what the attention is drawn for.
ASKED, ASKED_IMAGE = "what color is the shape?", "test/0.png"

Work = Callable[[Context], dict[str, Any]]
VllmOption = Annotated[
    bool, typer.Option("--vllm", help="Ask all MoReS adapters by vLLM, too, and compare every text; needs .venv-vllm.")
]


def main(output: OutputOption = OUTPUT, quick: QuickOption = False, vllm: VllmOption = False) -> None:
    """Build a small LLaVA on easy-VQA, shift its camera's colours, and teach them with MoReS."""
    with runner_of("demo", output, quick) as runner:
        results = run(QUICK if quick else FULL, runner, vllm=vllm)
    found = runner.root / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    report.plot(results, found.with_suffix(".png"))
    console = runner.console
    console.print(report.table(results))
    console.print(comparing.table_of(results["comparison"]))
    console.print(f"Asked in upstream's chat: {results['chat']['question']!r}. Answer: {results['chat']['answer']!r}")
    console.print(report.attention(results))
    if vllm:
        console.print(engines.sentence(**results["engines"]))
    console.print(f"[bold]{found}[/bold] and results.png beside it")
    tables = runner.root / comparing.OUTPUT / "results.md"
    console.print(f"[bold]{tables}[/bold] compares the tunings: differences, costs, learning rates")
    console.print(f"[bold]{runner.root / 'diagnosis' / diagnosis.REPORT}[/bold] shows what the models attend to")


def run(settings: Settings, runner: Runner, *, vllm: bool = False) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json.

    Args:
        vllm: whether vLLM answers, too.

    Raises:
        StageError: a stage failed, or vLLM should answer and is not there.
    """
    started = time.monotonic()
    if vllm:
        engines.vllms_python()
    base = build(settings.base, runner)
    asked = camera.questions("questions", settings.validation, settings.questions, runner)
    compared = _compare(settings, base, asked, runner)
    main, pictures = compared.firsts[MAIN.slug], camera.pictures(base)
    answered = runner.run_side_by_side(
        [
            Stage(
                f"eval-{name}-{seen}",
                {"camera": seen, "cell": cell},
                (asked, base.data, base.done),
                _evaluation(asked, base.data, seen, model),
                (scoring, commands),
            )
            for name, seen, model, cell in (
                ("base", "clean", base.model, None),
                ("base", "shifted", base.model, None),
                (MAIN.slug, "shifted", main.adapter, main.cell),
            )
        ]
    )
    chat = runner.run(Stage("chat", {"cell": main.cell}, (base.done,), _chat(base, main.adapter)))
    diagnosed_ones = [compared.firsts[slug] for slug in settings.diagnosed]
    measured = {"base": base.model} | {each.slug: each.adapter for each in diagnosed_ones}
    diagnosed = runner.run(
        Stage(
            "diagnosis",
            {"cells": [each.cell for each in diagnosed_ones], "samples": settings.diagnosis},
            (asked, base.data, base.done),
            _diagnosis(asked, pictures, measured, settings.diagnosis),
            (diagnosis,),
        )
    )
    both = _engines(settings, compared, base, asked, runner) if vllm else []
    names = (("base", "clean"), ("base", "shifted"), (MAIN.name, "shifted"))
    rows = [
        {"model": name, "camera": seen, **evaluation.values}
        for (name, seen), evaluation in zip(names, answered, strict=True)
    ]
    stages = (*base.stages, asked, *answered, chat, diagnosed, *both)
    return {
        "questions": settings.questions,
        "rows": rows,
        "comparison": compared.document,
        "chat": chat.values,
        "attention_to_image": diagnosed.values["image_shares"],
        "tower_accuracy": base.tower.values,
        **({"engines": {"upstream": both[1].values, "vllm": both[2].values}} if both else {}),
        "seconds": {done.folder.name: done.seconds for done in stages},
        "seed": SEED,
        "camera": list(CAMERA),
        **described(PACKAGES, started),
    }


def _compare(settings: Settings, base: Base, asked: Done, runner: Runner) -> Compared:
    file = runner.root / "compare.yaml"
    lengths = {"steps": settings.shift_steps, "batch": settings.base.batch}
    comparing.write_file(file, base, camera.data(base, asked), settings.tunings, **lengths, seeds=[SEED])
    return comparing.run(file, settings.tunings, runner)


def _engines(settings: Settings, compared: Compared, base: Base, asked: Done, runner: Runner) -> list[Done]:
    slugs = [each.slug for each in settings.tunings if each.flags["tuning_mode"] == "mores"]
    adapters = {slug: compared.firsts[slug].adapter for slug in slugs}
    return engines.compare(base, adapters, [compared.firsts[slug].cell for slug in slugs], asked, runner)


def _evaluation(asked: Done, data: Done, seen: str, model: Path) -> Work:
    """Answer the test with upstream's own evaluation."""

    def work(stage: Context) -> dict[str, Any]:
        answers, questions = stage.folder / "answers.jsonl", asked.folder / "test.jsonl"
        stage.run(commands.evaluate(answers, model, data.folder / "pictures" / seen, questions))
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
        picture = camera.pictures(base) / ASKED_IMAGE
        said = stage.run(commands.chat(adapter, picture), say=f"{ASKED}\n\n")
        answer = said.partition("ASSISTANT: ")[2].partition("USER: ")[0].strip()
        return {"question": ASKED, "image": f"shifted/{ASKED_IMAGE}", "answer": answer.removesuffix("</s>")}

    return work
