"""Measure an adapter's cost on a GPU: training steps and generation on a random LLaVA-1.5-7B, in bf16 and 4 bits.

The model is built on the device; nothing is downloaded. scripts/gpu_check.sh starts this command.
"""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .gpu_launches import BATCHES, launched
from .gpu_sizes import LLAVA_7B, TINY, Size
from .gpu_steps import generate, train
from .gpu_variants import FROZEN, Variant, variants
from .shared.machine import first_card, machine, open_console
from .shared.random_llava import build
from .shared.verdicts import write_json

PROJECT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llava-torch", "llava-steering-plugin")
ELSE = "`scripts/gpu_check.sh --tiny` runs the same code on the processor, and its figures mean nothing.\n"
NO_GPU = (
    "gpu_check: no CUDA device is visible, so there is nothing to measure. Run this on a machine with a GPU of 40 "
    f"GiB or more; {ELSE}"
)
NO_CUDA = (
    "gpu_check: torch {version} here is a build without CUDA, which uses no GPU. Install one with CUDA first, by "
    f"`export TORCH=torch=={{release}}; scripts/setup.sh`; {ELSE}"
)


def measured(size: Size, bits: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Train and generate with every variant; yield a row for each, with its error if it failed.

    A failure (out of memory, an error of bitsandbytes or PEFT) may leave hooks and layers on the model, so the next
    variant gets a new model.
    """
    model: Any = None
    for variant in variants(size.ranks):
        row: dict[str, Any] = {"bits": bits, "variant": variant.name}
        try:
            if model is None:
                model = build(size, device, bits)
            row |= _figures(model, variant, size)
        except Exception as error:  # noqa: BLE001 - the other variants are measured whatever fails
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        if "error" in row:
            model = None  # only here: within the handler, the traceback still refers to it
        _free_memory(device)
        yield row


def _figures(model: Any, variant: Variant, size: Size) -> dict[str, Any]:
    with variant.on(model) as parameters:
        trained = train(model, parameters, size)
        generated = generate(model, size)
        counted = launched(model, parameters, size)
    return asdict(trained) | asdict(generated) | asdict(counted)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_tests(console: Console) -> dict[str, Any]:
    """Run the tests that need CUDA; return pytest's status and last line.

    They see one GPU only: with several, a training in one process is skipped.
    """
    folder = PROJECT / "tests" / "gpu"
    if not folder.is_dir():
        return {"status": None, "summary": f"{folder} is not there"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, env=first_card(), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode not in (0, 5):  # 5: none collected
        console.print("\n".join(lines[-40:]), markup=False, highlight=False)
    summary = lines[-1] if lines else done.stderr[-500:]
    return {"status": done.returncode, "summary": summary}


def table_of_results(results: list[dict[str, Any]]) -> Table:
    """Return a table with a row for each measured variant; times are relative to the frozen model of the same bits."""
    table = Table(title="Training steps and generation", title_justify="left")
    columns = ("bits", "variant", "parameters", "step ms", "vs frozen", "peak GiB", "prefill ms", "tokens/s")
    for heading in columns:
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


def table_of_launches(results: list[dict[str, Any]]) -> Table:
    """Return a table of operations, of steps by batch, and of a decoder layer as it is and as a captured graph."""
    heads = ("bits", "variant", "forward", "backward", *(f"step ms, batch {batch}" for batch in BATCHES))
    table = Table(title="Operations of a training step, and times in which they show", title_justify="left")
    for heading in (*heads, "layer ms", "as a graph"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in results:
        if "error" not in row:
            times = [*(row["steps"][batch] for batch in BATCHES), row["layer"], row["replay"]]
            counts = (str(row["forward"]), str(row["backward"]))
            table.add_row(str(row["bits"]), row["variant"], *counts, *map(_milliseconds, times))
    return table


def _milliseconds(time: float | str) -> str:
    return "-" if isinstance(time, str) else f"{1e3 * time:.2f}"


def run(tiny: bool, output: Path, tests: bool) -> int:
    """Run the check; return its exit status."""
    console = open_console(140)
    if not torch.cuda.is_available() and not tiny:
        version = str(torch.__version__)
        without = torch.version.cuda is None
        sys.stderr.write(NO_CUDA.format(version=version, release=version.split("+")[0]) if without else NO_GPU)
        return 2
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
            # After each row, so that a later failure loses nothing.
            write_json(written, {"machine": about, "results": results, "tests": None})
            shown = row.get("error") or f"{row['seconds']:.4f} s a step"
            console.print(f"{bits} bits, {row['variant']}: {shown}", markup=False)
        _free_memory(device)  # the model has gone with the last row
    console.print(table_of_results(results))
    console.print(table_of_launches(results))
    failed = [f"{row['bits']} bits, {row['variant']}" for row in results if "error" in row]
    if failed:
        console.print(f"failed, and not in the table: {'; '.join(failed)}", markup=False)
    outcome = run_tests(console) if tests else None
    if outcome is not None:
        console.print(f"tests that need CUDA: {outcome['summary']}", markup=False)
    write_json(written, {"machine": about, "results": results, "tests": outcome})
    console.print(f"written: {written}")
    unsound = outcome is not None and outcome["status"] not in (None, 0, 5)
    return 1 if failed or unsound else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
