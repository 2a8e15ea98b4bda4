"""Compare the memory that `llava-steering plan` predicts with measured peaks of upstream's own training.

A random LLaVA of about 100 million parameters is written to a temporary folder. Upstream's train() runs for two steps,
in a process of its own for each setting (`memory_training`), which gives allocations back at once
(MALLOC_MMAP_THRESHOLD_). On CUDA the peak is torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan

from .memory_data import write_data
from .shared.machine import first_card, machine, open_console
from .shared.verdicts import table_of, write_json

LIMIT = 0.20
SEQUENCE = 512
CUDA = torch.cuda.is_available()
SCRIPTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Setting:
    """The settings of one training that differ between trainings."""

    mode: str
    projector: str
    checkpointing: bool
    batch: int
    dtype: str
    bits: int = 16

    def __str__(self) -> str:
        recomputed = f"checkpointing {'on' if self.checkpointing else 'off'}"
        packed = f", {self.bits} bits" if self.bits != 16 else ""
        return f"{self.mode}, projector {self.projector}, {recomputed}, batch {self.batch}, {self.dtype}{packed}"

    def flags(self, folder: Path) -> list[str]:
        """Return upstream's flags."""
        flags: dict[str, object] = {
            "model_name_or_path": folder / "llava-random",
            "version": "v1",
            "data_path": folder / "data.json",
            "image_folder": folder,
            "vision_tower": folder / "tower",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "bf16": self.dtype == "bf16",
            "bits": self.bits,
            "output_dir": folder / "out",
            "max_steps": 2,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-4,
            "model_max_length": SEQUENCE,
            "gradient_checkpointing": self.checkpointing,
            "lazy_preprocess": True,
            "report_to": "none",
            "use_cpu": not CUDA,
            "tuning_mode": self.mode,
            "freeze_mm_mlp_adapter": self.projector == "frozen",
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


SETTINGS = (
    Setting("mores", "frozen", True, 1, "fp32"),
    Setting("mores", "frozen", True, 4, "fp32"),
    Setting("mores", "frozen", False, 4, "fp32"),
    Setting("mores", "trained", True, 4, "fp32"),
    Setting("mores", "trained", False, 1, "fp32"),
    Setting("mores", "trained", True, 4, "bf16"),
    Setting("mixlora", "frozen", True, 1, "fp32"),
    Setting("mixlora", "frozen", True, 4, "fp32"),
    Setting("mixlora", "trained", False, 4, "fp32"),
    Setting("mixlora", "trained", True, 4, "bf16"),
    *((Setting("mores", "trained", True, 4, "bf16", 4), Setting("mixlora", "trained", True, 4, "bf16", 8)) * CUDA),
)


def compared(setting: Setting, folder: Path) -> dict[str, Any]:
    """Predict and measure one setting.

    Raises:
        RuntimeError: the training failed; the message has the end of its output.
    """
    flags, result = setting.flags(folder), folder / "peak"
    result.unlink(missing_ok=True)  # from the previous setting
    made = plan(flags, Wanted())
    if made.memory is None:
        raise RuntimeError(f"{setting}: no plan: {made.problems}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_training", str(result), *flags],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{setting}: the training failed:\n{done.stderr[-3000:]}")
    predicted, measured = made.memory.shardings[made.memory.chosen], int(result.read_text())
    return {
        "setting": str(setting),
        "predicted": predicted.total,
        "measured": measured,
        "error": predicted.total / measured - 1,
        "parts": asdict(predicted),
    }


def _environment() -> dict[str, str]:
    """Return the environment of a training process."""
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"WANDB_DISABLED": "true", "HF_HUB_OFFLINE": "1"}
    return {**first_card(), **offline, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(paths)}


def run(only: str, json_file: Path | None) -> int:
    """Run the settings whose description contains `only`; return the exit status."""
    console = open_console()
    title = f"Peak memory in MiB ({'CUDA' if CUDA else 'resident set'})"
    table = table_of(title, ("setting", "predicted", "measured", "error"))
    results: list[dict[str, Any]] = []
    about = machine()

    def write() -> None:
        if json_file is not None:
            content = {"machine": about, "limit": LIMIT, "results": results, "failed": failed(results)}
            write_json(json_file, content)

    with tempfile.TemporaryDirectory(prefix="measure-memory-") as scratch:
        write_data(Path(scratch))
        for setting in (setting for setting in SETTINGS if only in str(setting)):
            found = compared_or_failed(setting, Path(scratch))
            results.append(found)
            write()  # after each setting, so that a later failure loses nothing
            if "failure" in found:
                console.print(found["failure"], markup=False)
                table.add_row(str(setting), "-", "-", "failed")
                continue
            mebibytes = [f"{found[key] / 2**20:,.0f}" for key in ("predicted", "measured")]
            table.add_row(str(setting), *mebibytes, f"{found['error']:+.1%}")
    console.print(table)
    return 1 if failed(results) or not results else 0


def compared_or_failed(setting: Setting, folder: Path) -> dict[str, Any]:
    """Return the result of `compared`, or the reason of its failure under "failure"."""
    try:
        return compared(setting, folder)
    except (RuntimeError, SteeringError, OSError, ValueError) as error:
        return {"setting": str(setting), "failure": f"{type(error).__name__}: {error}"}


def failed(results: list[dict[str, Any]]) -> list[str]:
    """Return the settings that could not be measured or whose prediction is off by more than the limit."""
    return [found["setting"] for found in results if "failure" in found or abs(found["error"]) > LIMIT]
