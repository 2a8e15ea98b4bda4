"""The demo: a small LLaVA made by upstream's own stages, a camera that breaks its colours, and MoReS that mends them.

Run it through scripts/demo.sh, which sets everything up.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import commands
import report
import typer
import world
from base import Base, build
from rich.console import Console
from settings import CAMERA, FULL, QUICK, SEED, Settings, Tuning
from stages import Context, Done, Runner, Stage, StageError

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.checkout.patch import State, state

NEEDED_BYTES = 500e6
VERSIONS = ("llava-steering-plugin", "llava-torch", "torch", "transformers", "tokenizers", "peft", "numpy", "pillow")


def main(
    output: Annotated[Path, typer.Option(help="Where everything goes; finished stages in it are used again.")] = Path(
        "demo-output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="All parts, but too short to learn: for a first check.")
    ] = False,
) -> None:
    """Build a small LLaVA on easy-VQA, shift its camera's colours, and teach it back with MoReS."""
    console = Console()
    settings = QUICK if quick else FULL
    root = (output / "quick" if quick else output).resolve()
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < NEEDED_BYTES:
        raise SystemExit(
            f"demo: {root} has less than {NEEDED_BYTES / 1e6:.0f} MB free; give another place with --output"
        )
    if state(find_llava()) is not State.PATCHED:
        raise SystemExit(
            "demo: this llava is not patched; run `llava-steering patch`, or start scripts/demo.sh, which does"
        )
    # Nothing here is on a hub, and numbers from a GPU would differ.
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    runner = Runner(root, console)
    try:
        with runner.progress:
            results = run(settings, runner)
    except StageError as error:
        raise SystemExit(f"demo: {error}") from error
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.plot(results, root / "results.png")
    console.print(report.table(results))
    console.print(f"Asked in upstream's chat: {results['chat']['question']!r}. Answer: {results['chat']['answer']!r}")
    console.print(f"[bold]{root / 'results.json'}[/bold] and results.png beside it")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """All stages, in order; returns results.json."""
    started = time.monotonic()
    base = build(settings, runner)
    lengths = {"steps": settings.shift_steps, "batch": settings.batch}
    tuned = runner.run_side_by_side(
        [
            Stage(
                f"shift-{_slug(tuning)}",
                {**lengths, **tuning.flags, "lr": tuning.learning_rate},
                (base.done,),
                _shift(settings, tuning, base),
                (commands,),
            )
            for tuning in settings.tunings
        ]
    )
    test = runner.run(Stage("questions", {"count": settings.questions}, (), _questions(settings), (world,)))
    asked = [("clean", base.done, base.model, None), ("shifted", base.done, base.model, None)]
    for tuning, done in zip(settings.tunings, tuned, strict=True):
        told = base.model if tuning.flags.get("lora_enable") else None
        asked.append(("shifted", done, done.folder / f"llava-v1-{_slug(tuning)}", told))
    answered = runner.run_side_by_side(
        [
            Stage(
                f"eval-{path.name}-{camera}",
                {"camera": camera},
                (test, base.data, done),
                _evaluation(test, base.data, camera, path, told),
                (report,),
            )
            for camera, done, path, told in asked
        ]
    )
    chat = runner.run(Stage("chat", {}, (tuned[0],), _chat(base.data, asked[2][2])))
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
        "seconds_of_this_run": round(time.monotonic() - started, 1),
        "seed": SEED,
        "camera": list(CAMERA),
        "versions": {name: version(name) for name in VERSIONS},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _slug(tuning: Tuning) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in tuning.name.lower()).replace("--", "-")


def _shift(settings: Settings, tuning: Tuning, base: Base) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        output = stage.folder / f"llava-v1-{_slug(tuning)}"
        stage.run(commands.shift(settings, tuning, output, base.model, base.data.folder, base.clip))
        return {"parameters": report.parameters(output)}

    return work


def _questions(settings: Settings) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        world.write_questions(stage.folder, settings.questions)
        return {}

    return work


def _evaluation(test: Done, data: Done, camera: str, model: Path, told: Path | None) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        answers, pictures = stage.folder / "answers.jsonl", data.folder / "pictures" / camera
        stage.run(commands.evaluate(answers, model, told, pictures, test.folder / "questions.jsonl"))
        return report.accuracy(answers, test.folder / "answers.json")

    return work


def _chat(data: Done, adapter: Path) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        question, image = "what color is the shape?", "test/0.png"
        picture = data.folder / "pictures" / "shifted" / image
        said = stage.run(commands.chat(adapter, picture), say=f"{question}\n\n")
        answer = said.partition("ASSISTANT: ")[2].partition("USER: ")[0].strip()
        return {"question": question, "image": f"shifted/{image}", "answer": answer.removesuffix("</s>")}

    return work


if __name__ == "__main__":
    sys.exit(typer.run(main))
