"""Entry of scripts/gpu_check.sh; see there."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # bench_timing lies there

from backbone import build  # noqa: E402
from bench_timing import machine, write_json  # noqa: E402
from measuring import generate, train  # noqa: E402
from sizes import LLAVA_7B, TINY, Size  # noqa: E402
from variants import variants  # noqa: E402

from llava_steering_plugin.errors import SteeringError  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llava-torch", "llava-steering-plugin")
NO_GPU = (
    "gpu_check: no CUDA device is visible, so there is nothing to check here. Run this on a machine with a GPU of 40 "
    "GiB or more; `scripts/gpu_check.sh --tiny` runs the same code on the processor, and its figures mean nothing.\n"
)


def measured(size: Size, bits: int, device: torch.device, console: Console) -> list[dict[str, Any]]:
    """Trains and generates with every variant on one model."""
    model = build(size, device, bits)
    results = []
    for variant in variants(size.ranks):
        with variant.on(model) as parameters:
            trained = train(model, parameters, size)
            generated = generate(model, size)
        gc.collect()
        results.append({"bits": bits, "variant": variant.name, **asdict(trained), **asdict(generated)})
        console.print(f"{bits} bits, {variant.name}: {trained.seconds:.4f} s a step")
    return results


def run_tests(console: Console) -> dict[str, Any]:
    """The tests that need CUDA, skipped without one: pytest's status and its last line."""
    folder = HERE.parents[1] / "tests" / "gpu"
    if not folder.is_dir():
        return {"status": None, "summary": f"{folder} is not there"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(folder)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode not in (0, 5):  # 5: none collected
        console.print("\n".join(lines[-40:]), markup=False, highlight=False)
    return {"status": done.returncode, "summary": lines[-1] if lines else done.stderr[-500:]}


def tables(results: list[dict[str, Any]]) -> Table:
    """One row for each model and variant; times relative to the frozen model of the same bits."""
    table = Table(title="Training steps and generation", title_justify="left")
    headings = ("bits", "variant", "parameters", "step ms", "vs frozen", "peak GiB", "prefill ms", "tokens/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in results:
        frozen = next(other for other in results if other["bits"] == row["bits"])
        table.add_row(
            str(row["bits"]),
            row["variant"],
            f"{row['parameters']:,}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['seconds'] / frozen['seconds'] - 1:+.1%}",
            f"{row['peak'] / 2**30:.2f}",
            f"{1e3 * row['prefill']:.1f}",
            f"{row['tokens_per_second']:.1f}",
        )
    return table


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model, also without a GPU.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for gpu_check.json.")] = Path("gpu-check"),
    tests: Annotated[bool, typer.Option(help="Run the tests that need CUDA.")] = True,
) -> None:
    """Trains and generates on a random LLaVA, frozen, with the tuning modes and with LoRA."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if not torch.cuda.is_available() and not tiny:
        sys.stderr.write(NO_GPU)
        raise typer.Exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = TINY if tiny else LLAVA_7B
    about = {**machine(), "versions": {name: _version(name) for name in PACKAGES}, "size": asdict(size)}
    console.print(about)
    results = []
    for bits in (16, 4):
        results += measured(size, bits, device, console)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    console.print(tables(results))
    outcome = run_tests(console) if tests else None
    if outcome is not None:
        console.print(f"tests that need CUDA: {outcome['summary']}")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "gpu_check.json", {"machine": about, "results": results, "tests": outcome})
    console.print(f"written: {output / 'gpu_check.json'}")
    raise typer.Exit(1 if outcome is not None and outcome["status"] not in (None, 0, 5) else 0)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        typer.run(main)
    except SteeringError as error:
        sys.stderr.write(f"gpu_check: {error}\n")
        sys.exit(1)
