"""Run the multi-task measurement: tune the demo's base with LoRA and with MixLoRA for all tasks, and compare.

scripts/multitask.sh sets everything up and starts it. It uses the demo's base, and makes it if it is not there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments import backbone, comparing, diagnosis, scoring, world
from experiments.base import Base, build
from experiments.comparing import Compared, Data
from experiments.multitask import information, report, routing, tasks
from experiments.multitask.methods import FULL, QUICK, Settings
from experiments.multitask.tasks import CAMERAS, COLOUR_TASKS, TASKS
from experiments.program import (
    OUTPUT,
    OutputOption,
    ProcessesOption,
    QuickOption,
    SeedsOption,
    StepsOption,
    described,
    runner_of,
    sized,
)
from experiments.stages import Context, Done, Runner, Stage
from experiments.tuning import Tuning

PACKAGES = ("torch", "transformers", "peft", "llava-torch", "scikit-learn", "llava-steering-plugin")
SCRIPTS = Path(__file__).parents[2]

Work = Callable[[Context], dict[str, Any]]


def main(
    output: OutputOption = OUTPUT,
    quick: QuickOption = False,
    steps: StepsOption = None,
    seeds: SeedsOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Tune the demo's base for all tasks at once, with LoRA and with MixLoRA, and compare."""
    settings = sized(QUICK if quick else FULL, steps, seeds, processes)
    with runner_of("multitask", output, quick) as runner:
        results = run(settings, runner)
    found = runner.root / "multitask" / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    found.with_suffix(".md").write_text(report.markdown(results))
    report.plot(results, found.with_name("multitask.png"))
    runner.console.print(comparing.table_of(results["comparison"]))
    runner.console.print(f"[bold]{found}[/bold] with results.md and multitask.png beside it")
    tables = found.parent / comparing.OUTPUT / "results.md"
    runner.console.print(f"[bold]{tables}[/bold] has paired differences, costs and learning rates")
    page = runner.root / "multitask" / "diagnosis" / diagnosis.REPORT
    runner.console.print(f"[bold]{page}[/bold] shows how the tasks interfere, and how the routers choose")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json."""
    started = time.monotonic()
    base = build(settings.base, runner)
    counts = {"samples": settings.samples, "questions": settings.questions, "validation": settings.validation}
    content = {**counts, "cameras": CAMERAS}
    data = runner.run(Stage("multitask/data", content, (), _data(settings), (tasks, world, scoring)))
    methods = settings.methods(backbone.LAYERS, backbone.WIDTH)
    compared = _compare(settings, base, data, methods, runner)
    routers = {method.slug: method.name for method in methods if method.is_mixlora}
    routed = [each for each in compared.tested if each.slug in routers]
    told = runner.run_side_by_side(
        [
            Stage(
                f"multitask/told-{each.slug}-seed-{each.seed}",
                {"cell": each.cell},
                (data, base.done),
                _told(data, each.adapter),
                (routing, information),
            )
            for each in routed
        ]
    )
    firsts = compared.firsts
    diagnosed = runner.run(
        Stage(
            "multitask/diagnosis",
            {"cells": {slug: each.cell for slug, each in firsts.items()}, "samples": settings.diagnosis},
            (data, base.done),
            _diagnosis(data, {slug: each.adapter for slug, each in firsts.items()}, settings.diagnosis),
            (diagnosis,),
        )
    )
    rows = [
        {"method": routers[each.slug], "seed": each.seed, "information": done.values}
        for each, done in zip(routed, told, strict=True)
    ]
    stages = (data, *told, diagnosed)
    return {
        "date": date.today().isoformat(),
        "questions": settings.questions,
        "steps": settings.steps,
        "batch": settings.batch,
        "samples": settings.samples,
        "comparison": compared.document,
        "information": report.by_method(rows),
        "rows": rows,
        "seconds": {done.folder.name: done.seconds for done in stages},
        **described(PACKAGES, started),
    }


def _compare(settings: Settings, base: Base, data: Done, methods: Sequence[Tuning], runner: Runner) -> Compared:
    """Compare all methods: one training for all tasks, and each task a test of its own."""
    train, validation = data.folder / "train.json", data.folder / "validation.jsonl"
    tests = {task: data.folder / tasks.question_file(task) for task in TASKS}
    held = Data("all tasks", train, data.folder / "pictures", validation, tests)
    file = runner.root / "multitask" / "compare.yaml"
    lengths = {"steps": settings.steps, "batch": settings.batch, "processes": settings.processes}
    comparing.write_file(file, base, held, methods, **lengths, seeds=settings.seeds)
    return comparing.run(file, methods, runner)


def _data(settings: Settings) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        tasks.write(stage.folder, settings.samples, settings.questions, settings.validation)
        return {}

    return work


def _told(data: Done, adapter: Path) -> Work:
    """Measure what the chosen factors of a MixLoRA tell of the test questions' tasks."""

    def work(stage: Context) -> dict[str, Any]:
        chosen, questions = stage.folder / "routing.npz", data.folder / "test.jsonl"
        pictures = data.folder / "pictures"
        _run_module(
            stage, routing.__name__,
            "--adapter", adapter, "--questions", questions, "--pictures", pictures, "--output", chosen,
        )  # fmt: skip
        return _information(chosen, questions)

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


def _information(chosen: Path, questions: Path) -> dict[str, Any]:
    """Return how much the chosen factors tell of the task, and of the camera among questions about colours."""
    import numpy as np

    of_question = scoring.kinds_in(questions)
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
