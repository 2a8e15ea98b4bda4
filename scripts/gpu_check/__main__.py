"""Entry of scripts/gpu_check.sh; see there."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
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
from first_card import first_card  # noqa: E402
from measuring import generate, train  # noqa: E402
from sizes import LLAVA_7B, TINY, Size  # noqa: E402
from variants import FROZEN, Variant, variants  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llava-torch", "llava-steering-plugin")
ELSE = "`scripts/gpu_check.sh --tiny` runs the same code on the processor, and its figures mean nothing.\n"
NO_GPU = (
    "gpu_check: no CUDA device is visible, so there is nothing to check here. Run this on a machine with a GPU of 40 "
    f"GiB or more; {ELSE}"
)
NO_CUDA = (
    "gpu_check: torch {version} here is a build without CUDA, which uses no GPU. Install one with CUDA first, by "
    f"`export TORCH=torch=={{release}}; scripts/setup.sh`; {ELSE}"
)


def measured(size: Size, bits: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Trains and generates with every variant; gives a row for each, which says so if it failed.

    What fails (no memory, an error of bitsandbytes or PEFT) may leave its hooks and layers on the model, so the next
    variant gets a new one.
    """
    model: Any = None
    for variant in variants(size.ranks):
        row: dict[str, Any] = {"bits": bits, "variant": variant.name}
        try:
            if model is None:
                model = build(size, device, bits)
            row |= _figures(model, variant, size)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are measured all the same
            row["error"] = _told(error)
        if "error" in row:
            model = None  # only here: until the handler has ended, the traceback refers to it
        _free_memory(device)
        yield row


def _figures(model: Any, variant: Variant, size: Size) -> dict[str, Any]:
    with variant.on(model) as parameters:
        trained = train(model, parameters, size)
        generated = generate(model, size)
    return asdict(trained) | asdict(generated)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_tests(console: Console) -> dict[str, Any]:
    """The tests that need CUDA, skipped without one: pytest's status and last line.

    They see one card: on several, a training in one process is skipped.
    """
    folder = HERE.parents[1] / "tests" / "gpu"
    if not folder.is_dir():
        return {"status": None, "summary": f"{folder} is not there"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(folder)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=first_card(), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode not in (0, 5):  # 5: none collected
        console.print("\n".join(lines[-40:]), markup=False, highlight=False)
    summary = lines[-1] if lines else done.stderr[-500:]
    return {"status": done.returncode, "summary": summary}


def tables(results: list[dict[str, Any]]) -> Table:
    """One row for each model and variant that was measured; times relative to the frozen model of the same bits."""
    table = Table(title="Training steps and generation", title_justify="left")
    headings = ("bits", "variant", "parameters", "step ms", "vs frozen", "peak GiB", "prefill ms", "tokens/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    sound = [row for row in results if "error" not in row]
    frozen = {row["bits"]: row["seconds"] for row in sound if row["variant"] == FROZEN}
    for row in sound:
        base = frozen.get(row["bits"])
        table.add_row(
            str(row["bits"]),
            row["variant"],
            f"{row['parameters']:,}",
            f"{1e3 * row['seconds']:.1f}",
            "-" if base is None else f"{row['seconds'] / base - 1:+.1%}",
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
        version = str(torch.__version__)
        without = torch.version.cuda is None
        sys.stderr.write(NO_CUDA.format(version=version, release=version.split("+")[0]) if without else NO_GPU)
        raise typer.Exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = TINY if tiny else LLAVA_7B
    about = {**machine(), "versions": {name: _version(name) for name in PACKAGES}, "size": asdict(size)}
    console.print(about)
    output.mkdir(parents=True, exist_ok=True)
    written = output / "gpu_check.json"
    results: list[dict[str, Any]] = []
    for bits in (16, 4):
        for row in measured(size, bits, device):
            results.append(row)
            # At once: what was measured is not lost by what comes after it.
            write_json(written, {"machine": about, "results": results, "tests": None})
            told = row.get("error") or f"{row['seconds']:.4f} s a step"
            console.print(f"{bits} bits, {row['variant']}: {told}", markup=False)
        _free_memory(device)  # the model has gone with the last row
    console.print(tables(results))
    failed = [f"{row['bits']} bits, {row['variant']}" for row in results if "error" in row]
    if failed:
        console.print(f"failed, and not in the table: {'; '.join(failed)}", markup=False)
    outcome = run_tests(console) if tests else None
    if outcome is not None:
        console.print(f"tests that need CUDA: {outcome['summary']}", markup=False)
    write_json(written, {"machine": about, "results": results, "tests": outcome})
    console.print(f"written: {written}")
    unsound = outcome is not None and outcome["status"] not in (None, 0, 5)
    raise typer.Exit(1 if failed or unsound else 0)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    typer.run(main)
