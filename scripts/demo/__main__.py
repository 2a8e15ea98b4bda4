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
from backbone import build_language_model, build_tower
from rich.console import Console
from settings import CAMERA, FULL, QUICK, SEED, Settings, Tuning
from stages import Context, Done, Runner, Stage, StageError

NEEDED_BYTES = 500e6


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
    data = runner.run(Stage("data", {"questions": settings.questions, "camera": CAMERA}, (), _data(settings)))
    tower = runner.run(Stage("tower", {"epochs": settings.tower_epochs}, (data,), _tower(settings)))
    llm = runner.run(
        Stage("language-model", {}, (data,), lambda stage: build_language_model(stage.folder / "llm") or {})
    )
    lengths = {"steps": settings.projector_steps, "batch": settings.batch}
    projector = runner.run(
        Stage("stage-1-projector", lengths, (data, tower, llm), _projector(settings, data, tower, llm))
    )
    lengths = {"steps": settings.tuning_steps, "batch": settings.batch}
    base = runner.run(Stage("stage-2-base", lengths, (projector,), _base(settings, data, tower, llm, projector)))
    lengths = {"steps": settings.shift_steps, "batch": settings.batch}
    tuned = runner.run_side_by_side(
        [
            Stage(
                f"shift-{_slug(tuning)}",
                {**lengths, **tuning.flags, "lr": tuning.learning_rate},
                (base,),
                _shift(settings, tuning, data, tower, base),
            )
            for tuning in settings.tunings
        ]
    )
    model = base.folder / "llava-v1-base"
    asked = [("clean", base, model, None), ("shifted", base, model, None)]
    for tuning, done in zip(settings.tunings, tuned, strict=True):
        told = model if tuning.flags.get("lora_enable") else None
        asked.append(("shifted", done, done.folder / f"llava-v1-{_slug(tuning)}", told))
    answered = runner.run_side_by_side(
        [
            Stage(f"eval-{path.name}-{camera}", {"camera": camera}, (data, done), _evaluation(data, camera, path, told))
            for camera, done, path, told in asked
        ]
    )
    chat = runner.run(Stage("chat", {}, (tuned[0],), _chat(data, asked[2][2])))
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
    stages = (data, tower, llm, projector, base, *tuned, *answered, chat)
    return {
        "questions": settings.questions,
        "rows": rows,
        "chat": chat.values,
        "tower_accuracy": tower.values,
        "seconds": {done.folder.name: done.seconds for done in stages},
        "seconds_of_this_run": round(time.monotonic() - started, 1),
        "seed": SEED,
        "camera": list(CAMERA),
        "versions": {name: version(name) for name in ("torch", "transformers", "llava-steering-plugin")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def _slug(tuning: Tuning) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in tuning.name.lower()).replace("--", "-")


def _data(settings: Settings) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        world.write(stage.folder, settings.questions)
        return {}

    return work


def _tower(settings: Settings) -> Any:
    return lambda stage: build_tower(stage.folder / "clip-tower", settings.tower_epochs, stage.report)


def _projector(settings: Settings, data: Done, tower: Done, llm: Done) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        output = stage.folder / "projector"
        stage.run(commands.stage_1(settings, output, llm.folder / "llm", data.folder, tower.folder / "clip-tower"))
        return {}

    return work


def _base(settings: Settings, data: Done, tower: Done, llm: Done, projector: Done) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        weights = projector.folder / "projector" / "mm_projector.bin"
        output, clip = stage.folder / "llava-v1-base", tower.folder / "clip-tower"
        stage.run(commands.stage_2(settings, output, llm.folder / "llm", weights, data.folder, clip))
        return {}

    return work


def _shift(settings: Settings, tuning: Tuning, data: Done, tower: Done, base: Done) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        output = stage.folder / f"llava-v1-{_slug(tuning)}"
        model = base.folder / "llava-v1-base"
        stage.run(commands.shift(settings, tuning, output, model, data.folder, tower.folder / "clip-tower"))
        return {"parameters": _parameters(output)}

    return work


def _parameters(adapter: Path) -> int:
    """Trained parameters in an adapter's file, ours or PEFT's."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if not name.startswith("fingerprint.")]
    count = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        count += size
    return count


def _evaluation(data: Done, camera: str, model: Path, told: Path | None) -> Any:
    def work(stage: Context) -> dict[str, Any]:
        answers = stage.folder / "answers.jsonl"
        stage.run(commands.evaluate(answers, model, told, data.folder / "pictures" / camera, data.folder))
        return report.accuracy(answers, data.folder / "answers.json")

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
