"""Compare fixed shares of steered tokens with the dynamic one, at the same steps, seeds and order of samples.

The task is the demo's: a camera with permuted colour channels is taught to its base. scripts/ratios.sh sets everything
up and starts it. It uses the demo's base, and makes it if it is not there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from experiments import camera, comparing, world
from experiments.camera import Settings
from experiments.comparing import Tested
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
from experiments.ratios.settings import FULL, QUICK
from experiments.stages import Runner

PACKAGES = ("torch", "transformers", "llava-torch", "llava-steering-plugin")


def main(
    output: OutputOption = OUTPUT,
    quick: QuickOption = False,
    steps: StepsOption = None,
    seeds: SeedsOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Tune the demo's base with MoReS on fixed shares of an image's tokens, and with shares that layers choose."""
    settings = sized(QUICK if quick else FULL, steps, seeds, processes)
    with runner_of("ratios", output, quick) as runner:
        results = run(settings, runner)
    found = runner.root / "ratios" / "results.json"
    found.write_text(json.dumps(results, indent=2) + "\n")
    found.with_suffix(".md").write_text(markdown(results))
    runner.console.print(markdown(results), markup=False)
    runner.console.print(f"[bold]{found}[/bold] with results.md beside it")
    tables = found.parent / comparing.OUTPUT / "results.md"
    runner.console.print(f"[bold]{tables}[/bold] has paired differences and costs")


def run(settings: Settings, runner: Runner) -> dict[str, Any]:
    """Compare all tunings; return the content of results.json."""
    started = time.monotonic()
    compared = camera.compare("ratios", settings, runner)
    names = {tuning.slug: tuning.name for tuning in settings.tunings}
    return {
        "questions": settings.questions,
        "steps": settings.steps,
        "rows": [_row(names[each.slug], each) for each in compared.tested],
        "comparison": compared.document,
        **described(PACKAGES, started),
        "date": date.today().isoformat(),
    }


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
    layers.sort(key=lambda path: int(path.rpartition(".")[2]))
    return [by_layer.get(path, selections[0].spec) for path in layers]


def _row(tokens: str, tested: Tested) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "seed": tested.seed,
        "parameters": tested.parameters,
        "accuracy": tested.accuracy,
        "chosen": chosen(tested.adapter),
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
