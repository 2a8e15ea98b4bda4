"""Compare fixed shares of steered tokens with the dynamic one, at the same steps, seeds and order of samples.

The task is the demo's: a camera with permuted colour channels is taught to its base. scripts/ratios.sh sets everything
up and starts it. It uses the demo's base, and makes it if it is not there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import commands, scoring, world
from experiments.base import Base, build
from experiments.program import OUTPUT, OutputOption, QuickOption, described, runner_of
from experiments.ratios.settings import FULL, QUICK, Settings
from experiments.stages import Context, Done, Runner, Stage
from experiments.tuning import Lengths, Tuning, tuning_stage

PACKAGES = ("torch", "transformers", "llava-torch", "llava-steering-plugin")
Work = Callable[[Context], dict[str, Any]]


def main(
    output: OutputOption = OUTPUT,
    quick: QuickOption = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds.")] = None,
) -> None:
    """Tune the demo's base with MoReS on fixed shares of an image's tokens, and with shares that layers choose."""
    settings = QUICK if quick else FULL
    settings = replace(
        settings,
        steps=steps or settings.steps,
        seeds=tuple(range(1, seeds + 1)) if seeds else settings.seeds,
    )
    with runner_of("ratios", output, quick) as runner:
        results = run(settings, runner)
    found = runner.root / "ratios" / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    found.with_suffix(".md").write_text(markdown(results))
    runner.console.print(markdown(results), markup=False)
    runner.console.print(f"[bold]{found}[/bold] with results.md beside it")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json."""
    started = time.monotonic()
    base = build(settings.base, runner)
    pictures = base.data.folder / "pictures" / "shifted"
    test = runner.run(
        Stage("ratios/questions", {"count": settings.questions}, (), _questions(settings), (world, scoring))
    )
    wanted = [(tuning, seed) for seed in settings.seeds for tuning in settings.tunings]
    trained = runner.run_side_by_side(
        [
            tuning_stage(
                f"ratios/train-{tuning.slug}-seed-{seed}",
                tuning,
                Lengths(settings.steps, settings.base.batch, seed),
                base,
                base.data,
                pictures,
            )
            for tuning, seed in wanted
        ]
    )
    answered = runner.run_side_by_side(
        [
            Stage(
                f"ratios/eval-{tuning.slug}-seed-{seed}",
                {},
                (test, base.data, done),
                _evaluation(test, base, tuning.adapter(done.folder), pictures),
                (scoring,),
            )
            for (tuning, seed), done in zip(wanted, trained, strict=True)
        ]
    )
    return {
        "questions": settings.questions,
        "steps": settings.steps,
        "rows": [_row(tuning, seed, *dones) for (tuning, seed), *dones in zip(wanted, trained, answered, strict=True)],
        **described(PACKAGES, started),
        "date": date.today().isoformat(),
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


def _evaluation(test: Done, base: Base, adapter: Path, pictures: Path) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        answers = stage.folder / "answers.jsonl"
        stage.run(commands.evaluate_batched(answers, base.model, adapter, pictures, test.folder / "questions.jsonl"))
        accuracy = scoring.accuracy(answers, test.folder / "answers.json", world.KINDS)
        return {"accuracy": accuracy, "chosen": chosen(adapter)}

    return work


def chosen(adapter: Path) -> list[str]:
    """Return the tokens that each layer steers, in the order of the layers."""
    from llava_steering_plugin.adapters.stored.folder import ADAPTER
    from llava_steering_plugin.adapters.stored.locate import read
    from llava_steering_plugin.modes.mores_choice import chosen_by_layer
    from llava_steering_plugin.modes.mores_selection import parse_choices

    stored = read(adapter)
    tensors = stored.section(ADAPTER)
    selections = parse_choices(stored.config.settings["tokens"])
    layers = [name.removesuffix(".vis.steer_offset") for name in tensors if name.endswith(".vis.steer_offset")]
    by_layer = chosen_by_layer(tensors, selections).get("vis", {})
    return [by_layer.get(path, selections[0].spec) for path in sorted(layers)]


def _row(tuning: Tuning, seed: int, trained: Done, answered: Done) -> dict[str, Any]:
    return {
        "tokens": tuning.name,
        "seed": seed,
        "parameters": trained.values["parameters"],
        "train_seconds": trained.seconds,
        **answered.values,
    }


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table: accuracy as mean and range over the seeds, and what each layer chose with every seed."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    lines = [
        f"| `--mores_tokens` | trained parameters | {' | '.join(world.KINDS)} | chosen by layers 0 to 3, by seed |",
        f"| --- | ---: | {' | '.join('---:' for _ in world.KINDS)} | --- |",
    ]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        same = [row for row in rows if row["tokens"] == tokens]
        shares = [_spread([row["accuracy"][kind] for row in same]) for kind in world.KINDS]
        said = "; ".join(" ".join(row["chosen"]) for row in same) if "," in tokens else ""
        lines.append(f"| `{tokens}` | {same[0]['parameters']:,} | {' | '.join(shares)} | {said} |")
    return "\n".join(lines) + "\n"


def _spread(shares: Sequence[float]) -> str:
    mean = f"{statistics.mean(shares):.1%}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.1%} to {max(shares):.1%})"
