"""The multi-task measurement: LoRA and MixLoRA on tasks that pull against each other, one adapter for all of them.

Run it through scripts/multitask.sh, which sets everything up. It uses the demo's base, and makes it if it is not there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(1, str(Path(__file__).parents[1] / "demo"))

import backbone
import commands
import information
import report
import settings
import tasks
import typer
import world
from base import Base, build
from methods import FULL, QUICK, Method, Plan
from rich.console import Console
from stages import Context, Done, Runner, Stage, StageError
from summary import by_method, differences, markdown, plot, table
from tasks import CAMERAS, COLOUR_TASKS, TASKS

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.checkout.patch import State, state

NEEDED_BYTES = 500e6
ANSWERING = Path(__file__).with_name("answering.py")


def main(
    output: Annotated[
        Path, typer.Option(help="Where the demo puts everything; finished stages in it are used again.")
    ] = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="All parts, but too short to learn: for a first check.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, in place of the plan's.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, in place of the plan's.")] = None,
) -> None:
    """Tune the demo's base for all tasks at once, with LoRA and with MixLoRA, and compare."""
    console = Console()
    plan, demo = (QUICK, settings.QUICK) if quick else (FULL, settings.FULL)
    plan = replace(plan, steps=steps or plan.steps, seeds=tuple(range(1, seeds + 1)) if seeds else plan.seeds)
    root = (output / "quick" if quick else output).resolve()
    (root / "multitask").mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < NEEDED_BYTES:
        raise SystemExit(
            f"multitask: {root} has less than {NEEDED_BYTES / 1e6:.0f} MB free; give another place with --output"
        )
    if state(find_llava()) is not State.PATCHED:
        raise SystemExit(
            "multitask: this llava is not patched; run `llava-steering patch`, or scripts/multitask.sh, which does"
        )
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    runner = Runner(root, console)
    try:
        with runner.progress:
            results = run(plan, build(demo, runner), runner)
    except StageError as error:
        raise SystemExit(f"multitask: {error}") from error
    found = root / "multitask" / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    found.with_suffix(".md").write_text(markdown(results))
    plot(results, found.with_name("multitask.png"))
    console.print(table(results))
    console.print(f"[bold]{found}[/bold] with results.md and multitask.png beside it")


def run(plan: Plan, base: Base, runner: Runner) -> dict[str, Any]:
    """All stages after the base, in order; returns results.json."""
    started = time.monotonic()
    content = {"samples": plan.samples, "questions": plan.questions, "cameras": CAMERAS}
    data = runner.run(Stage("multitask/data", content, (), _data(plan), (tasks, world)))
    methods = plan.methods(backbone.LAYERS, backbone.WIDTH)
    wanted = [(method, seed) for seed in plan.seeds for method in methods]
    trained = runner.run_side_by_side(
        [
            Stage(
                f"multitask/train-{method.slug}-seed-{seed}",
                {
                    "steps": plan.steps,
                    "batch": plan.batch,
                    "seed": seed,
                    "lr": method.learning_rate,
                    **method.flags,
                },
                (data, base.done),
                _training(plan, method, seed, base, data),
                (commands,),
            )
            for method, seed in wanted
        ]
    )
    models = [("base", base.model, None, base.done, False)]
    for (method, seed), done in zip(wanted, trained, strict=True):
        told = base.model if method.is_lora else None
        models.append((f"{method.slug}-seed-{seed}", _adapter(done, method), told, done, not method.is_lora))
    answered = runner.run_side_by_side(
        [
            Stage(
                f"multitask/eval-{name}",
                {"program": ANSWERING.read_text()},
                (data, done),
                _answering(data, model, told, routed),
                (report, information),
            )
            for name, model, told, done, routed in models
        ]
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
    first = methods[0].name
    return {
        "date": date.today().isoformat(),
        "questions": plan.questions,
        "steps": plan.steps,
        "batch": plan.batch,
        "samples": plan.samples,
        "learning_rates": {method.name: method.learning_rate for method in methods},
        "base": answered[0].values["accuracy"],
        "methods": by_method(rows),
        "differences": {
            f"{method.name} - {first}": differences(rows, method.name, first, ("all", *TASKS)) for method in methods[1:]
        },
        "rows": rows,
        "seconds": {done.folder.name: done.seconds for done in (data, *trained, *answered)},
        "seconds_of_this_run": round(time.monotonic() - started, 1),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "peft", "llava-torch", "scikit-learn", "llava-steering-plugin")
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _adapter(trained: Done, method: Method) -> Path:
    return trained.folder / f"llava-v1-{method.slug}"


def _data(plan: Plan) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        tasks.write(stage.folder, plan.samples, plan.questions)
        return {}

    return work


def _training(plan: Plan, method: Method, seed: int, base: Base, data: Done) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        output = stage.folder / f"llava-v1-{method.slug}"
        flags: dict[str, object] = {
            "freeze_mm_mlp_adapter": True,
            "max_steps": plan.steps,
            "per_device_train_batch_size": plan.batch,
            "learning_rate": method.learning_rate,
            "seed": seed,
            **method.flags,
        }
        stage.run(
            commands.train(output, base.model, data.folder / "train.json", data.folder / "pictures", base.clip, flags)
        )
        # Frozen routers are in the file and are not trained.
        return {"parameters": report.parameters(output, without="router_" if method.frozen_routers else None)}

    return work


def _answering(data: Done, model: Path, told: Path | None, routed: bool) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        answers, routing = stage.folder / "answers.jsonl", stage.folder / "routing.npz"
        command = [sys.executable, str(ANSWERING), "--model", str(model), "--answers", str(answers)]
        command += ["--questions", str(data.folder / "questions.jsonl"), "--pictures", str(data.folder / "pictures")]
        command += ["--base", str(told)] if told else []
        stage.run(command + (["--routing", str(routing)] if routed else []))
        expected = data.folder / "answers.json"
        values: dict[str, Any] = {"accuracy": report.accuracy(answers, expected, TASKS)}
        return {**values, "information": _information(routing, expected)} if routed else values

    return work


def _information(routing: Path, expected: Path) -> dict[str, Any]:
    """How much the chosen factors tell of the task among all tasks, and of the camera among questions about colours."""
    import numpy as np

    of_question = [entry["kind"] for entry in json.loads(expected.read_text())]
    coloured = [place for place, task in enumerate(of_question) if task in COLOUR_TASKS]
    found: dict[str, Any] = {}
    with np.load(routing) as file:
        chosen = {name: file[name] for name in file.files}
    for within, places in (("tasks", list(range(len(of_question)))), ("cameras", coloured)):
        linears = information.of_linears(
            [of_question[place] for place in places], {name: at[places] for name, at in chosen.items()}
        )
        layers: dict[str, dict[str, Any]] = {}
        for name, figures in linears.items():
            layers.setdefault(name.split(".")[1], {})[name] = figures
        found[within] = {
            **information.mean_of(linears),
            "layers": {layer: information.mean_of(own)["told"] for layer, own in layers.items()},
        }
    return found


if __name__ == "__main__":
    sys.exit(typer.run(main))
