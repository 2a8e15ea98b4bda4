"""Run the multi-task measurement: tune the demo's base with LoRA and with MixLoRA for all tasks, and compare.

scripts/multitask.sh sets everything up and starts it. It uses the demo's base, and makes it if it is not there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import backbone, commands, diagnosis, scoring, world
from experiments.base import Base, build
from experiments.multitask import information, merging, report, routing, tasks
from experiments.multitask.methods import FULL, QUICK, Settings
from experiments.multitask.tasks import CAMERAS, COLOUR_TASKS, TASKS
from experiments.program import OUTPUT, OutputOption, QuickOption, described, runner_of
from experiments.stages import Context, Done, Runner, Stage
from experiments.tuning import Lengths, Tuning, tuning_stage

PACKAGES = ("torch", "transformers", "peft", "llava-torch", "scikit-learn", "llava-steering-plugin")
SCRIPTS = Path(__file__).parents[2]

Work = Callable[[Context], dict[str, Any]]


def main(
    output: OutputOption = OUTPUT,
    quick: QuickOption = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds.")] = None,
) -> None:
    """Tune the demo's base for all tasks at once, with LoRA and with MixLoRA, and compare."""
    settings = QUICK if quick else FULL
    settings = replace(
        settings,
        steps=steps or settings.steps,
        seeds=tuple(range(1, seeds + 1)) if seeds else settings.seeds,
    )
    with runner_of("multitask", output, quick) as runner:
        results = run(settings, runner)
    found = runner.root / "multitask" / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    found.with_suffix(".md").write_text(report.markdown(results))
    report.plot(results, found.with_name("multitask.png"))
    runner.console.print(report.table(results))
    runner.console.print(f"[bold]{found}[/bold] with results.md and multitask.png beside it")
    page = runner.root / "multitask" / "diagnosis" / diagnosis.REPORT
    runner.console.print(f"[bold]{page}[/bold] shows how the tasks interfere, and how the routers choose")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json."""
    started = time.monotonic()
    base = build(settings.base, runner)
    content = {"samples": settings.samples, "questions": settings.questions, "cameras": CAMERAS}
    data = runner.run(Stage("multitask/data", content, (), _data(settings), (tasks, world, scoring)))
    methods = settings.methods(backbone.LAYERS, backbone.WIDTH)
    wanted = [(method, seed) for seed in settings.seeds for method in methods]
    trained = runner.run_side_by_side(
        [
            tuning_stage(
                f"multitask/train-{method.slug}-seed-{seed}",
                method,
                Lengths(settings.steps, settings.batch, seed),
                base,
                data,
                data.folder / "pictures",
            )
            for method, seed in wanted
        ]
    )
    needs = (data, base.done)
    answers = [Stage("multitask/eval-base", {}, needs, _answers(data, base.model, None), (commands, scoring))]
    for (method, seed), done in zip(wanted, trained, strict=True):
        name, adapter = f"multitask/eval-{method.slug}-seed-{seed}", method.adapter(done.folder)
        work = _lora_answers(data, base, adapter) if method.is_lora else _routed_answers(data, base, adapter)
        answers.append(Stage(name, {}, (*needs, done), work, (commands, scoring, merging, routing, information)))
    answered = runner.run_side_by_side(answers)
    first = {
        method.slug: method.adapter(done.folder)
        for (method, seed), done in zip(wanted, trained, strict=True)
        if seed == settings.seeds[0]
    }
    diagnosed = runner.run(
        Stage(
            "multitask/diagnosis",
            {"models": list(first), "samples": settings.diagnosis},
            (*needs, *trained[: len(methods)]),
            _diagnosis(data, first, settings.diagnosis),
            (diagnosis,),
        )
    )
    rows = [
        {
            "method": method.name,
            "seed": seed,
            "parameters": done.values["parameters"],
            "train_seconds": done.seconds,
            **evaluation.values,
        }
        for (method, seed), done, evaluation in zip(wanted, trained, answered[1:], strict=True)
    ]
    stages = (data, *trained, *answered, diagnosed)
    return {
        "date": date.today().isoformat(),
        "questions": settings.questions,
        "steps": settings.steps,
        "batch": settings.batch,
        "samples": settings.samples,
        "learning_rates": {method.name: method.learning_rate for method in methods},
        "base": answered[0].values["accuracy"],
        "methods": report.by_method(rows),
        "differences": _differences(rows, methods),
        "rows": rows,
        "seconds": {done.folder.name: done.seconds for done in stages},
        **described(PACKAGES, started),
    }


def _differences(rows: list[dict[str, Any]], methods: tuple[Tuning, ...]) -> dict[str, Any]:
    """Return the differences of every method from the first one."""
    first, *others = methods
    return {
        f"{method.name} - {first.name}": report.differences(rows, method.name, first.name, ("all", *TASKS))
        for method in others
    }


def _data(settings: Settings) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        tasks.write(stage.folder, settings.samples, settings.questions)
        return {}

    return work


def _answers(data: Done, base: Path, adapter: Path | None) -> Work:
    """Answer the questions with `llava-steering eval`, by the base or by one of our adapters on it."""

    def work(stage: Context) -> dict[str, Any]:
        answers, questions = stage.folder / "answers.jsonl", data.folder / "questions.jsonl"
        stage.run(commands.evaluate_batched(answers, base, adapter, data.folder / "pictures", questions))
        return {"accuracy": scoring.accuracy(answers, data.folder / "answers.json", TASKS)}

    return work


def _lora_answers(data: Done, base: Base, adapter: Path) -> Work:
    """Answer with LoRA: it is merged into the base first, because `eval` loads no LoRA."""

    def work(stage: Context) -> dict[str, Any]:
        merged = stage.folder / "merged"
        _run_module(stage, merging.__name__, "--adapter", adapter, "--base", base.model, "--output", merged)
        return _answers(data, merged, None)(stage)

    return work


def _routed_answers(data: Done, base: Base, adapter: Path) -> Work:
    """Answer with MixLoRA, and measure what the chosen factors tell."""

    def work(stage: Context) -> dict[str, Any]:
        values = _answers(data, base.model, adapter)(stage)
        chosen, questions = stage.folder / "routing.npz", data.folder / "questions.jsonl"
        pictures = data.folder / "pictures"
        _run_module(
            stage, routing.__name__,
            "--adapter", adapter, "--questions", questions, "--pictures", pictures, "--output", chosen,
        )  # fmt: skip
        return {**values, "information": _information(chosen, data.folder / "answers.json")}

    return work


def _diagnosis(data: Done, models: Mapping[str, Path], samples: int) -> Work:
    """Measure interference between the tasks, and the routers' choices, on questions that were not trained on."""

    def work(stage: Context) -> dict[str, Any]:
        held_out, pictures = data.folder / "held-out.json", data.folder / "pictures"
        routed = {name: path for name, path in models.items() if name.startswith("mixlora")}
        diagnosis.interference(stage, models, held_out, pictures, samples)
        diagnosis.routing(stage, routed, held_out, pictures, samples)
        diagnosis.report(stage)
        return {}

    return work


def _run_module(stage: Context, module: str, *words: object) -> None:
    """Run a module of the experiments in a process of its own."""
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    stage.run([sys.executable, "-m", module, *map(str, words)], env={"PYTHONPATH": os.pathsep.join(paths)})


def _information(chosen: Path, expected: Path) -> dict[str, Any]:
    """Return how much the chosen factors tell of the task, and of the camera among questions about colours."""
    import numpy as np

    of_question = [entry["kind"] for entry in json.loads(expected.read_text())]
    coloured = [place for place, task in enumerate(of_question) if task in COLOUR_TASKS]
    found: dict[str, Any] = {}
    with np.load(chosen) as file:
        factors = {name: file[name] for name in file.files}
    for within, places in (("tasks", list(range(len(of_question)))), ("cameras", coloured)):
        linears = information.of_linears(
            [of_question[place] for place in places], {name: at[places] for name, at in factors.items()}
        )
        layers: dict[str, dict[str, Any]] = {}
        for name, figures in linears.items():
            layers.setdefault(name.split(".")[1], {})[name] = figures
        found[within] = {
            **information.mean_of(linears),
            "layers": {layer: information.mean_of(own)["told"] for layer, own in layers.items()},
        }
    return found
