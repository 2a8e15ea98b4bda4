"""Compares `llava-steering plan`'s memory with measured peaks of upstream's own training.

    python scripts/measure_memory.py [--only TEXT] [--json FILE]

A random LLaVA of about 100 million parameters is written to a temporary folder and trained by upstream's train() for
two steps, in a process of its own for each setting. Without a GPU the peak is the resident set (VmHWM) of that process
during training, minus the resident set just before the model is built; allocations are given back at once
(MALLOC_MMAP_THRESHOLD_), and libraries are warmed up before, so that their code does not count. On CUDA it is
torch.cuda.max_memory_allocated. Status 1 if a prediction is off by more than 20 %, or a training failed.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_timing import machine, write_json
from first_card import first_card
from memory_world import write_world
from peaks import forget_peak, in_use, peak
from rich.console import Console
from rich.table import Table

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan

LIMIT = 0.20
SEQUENCE = 512
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Setting:
    """One training: what differs from the other ones."""

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
        """Upstream's flags."""
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


def train_and_measure(flags: list[str], result: Path) -> None:
    """In a process of its own: upstream's train(), and the peak of its memory."""
    from llava_steering_plugin.upstream.install import install

    install()
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.train import train as upstream
    from transformers import TrainerCallback

    before: list[int] = []
    build = LlavaLlamaForCausalLM.from_pretrained

    def built(*args: Any, **kwargs: Any) -> Any:
        before.append(in_use(cuda=CUDA))
        return build(*args, **kwargs)

    class Peak(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gc.collect()
            forget_peak(cuda=CUDA)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            result.write_text(str(peak(cuda=CUDA) - before[0]), encoding="utf-8")

    class Watched(upstream.LLaVATrainer):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.add_callback(Peak())

    upstream.__dict__["LLaVATrainer"] = Watched
    LlavaLlamaForCausalLM.from_pretrained = built
    _warm_up()
    sys.argv = ["train.py", *flags]
    upstream.train()


def _warm_up() -> None:
    """Loads the code of what a step computes: it is read from disk when first used, and no part of the training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(config).to("cuda" if CUDA else "cpu", dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.ones(1, 64, dtype=torch.long, device=model.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    gc.collect()


def compared(setting: Setting, folder: Path) -> dict[str, Any]:
    """Predicts and measures one setting.

    Raises:
        RuntimeError: the training failed; with the end of what it said.
    """
    flags, result = setting.flags(folder), folder / "peak"
    result.unlink(missing_ok=True)  # of the setting before this one
    made = plan(flags, Wanted())
    if made.memory is None:
        raise RuntimeError(f"{setting}: no plan: {made.problems}")
    done = subprocess.run(
        [sys.executable, __file__, "--train", str(result), *flags],
        env={**first_card(), "MALLOC_MMAP_THRESHOLD_": "65536", "WANDB_DISABLED": "true", "HF_HUB_OFFLINE": "1"},
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


def main(
    only: Annotated[str, typer.Option(help="Only settings whose description contains this.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Predicts and measures the peak memory of trainings."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"Peak memory in MiB ({'CUDA' if CUDA else 'resident set'})", title_justify="left")
    for heading in ("setting", "predicted", "measured", "error"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    results: list[dict[str, Any]] = []
    about = machine()

    def write() -> None:
        if json_file is not None:
            content = {"machine": about, "limit": LIMIT, "results": results, "failed": failed(results)}
            write_json(json_file, content)

    with tempfile.TemporaryDirectory(prefix="measure-memory-") as scratch:
        write_world(Path(scratch))
        for setting in (setting for setting in SETTINGS if only in str(setting)):
            found = compared_or_failed(setting, Path(scratch))
            results.append(found)
            write()  # at once: what was measured is not lost by what comes after it
            if "failure" in found:
                console.print(found["failure"], markup=False)
                table.add_row(str(setting), "-", "-", "failed")
                continue
            mebibytes = [f"{found[key] / 2**20:,.0f}" for key in ("predicted", "measured")]
            table.add_row(str(setting), *mebibytes, f"{found['error']:+.1%}")
    console.print(table)
    raise typer.Exit(1 if failed(results) or not results else 0)


def compared_or_failed(setting: Setting, folder: Path) -> dict[str, Any]:
    """What `compared` gives, or under "failure" why it gives nothing."""
    try:
        return compared(setting, folder)
    except (RuntimeError, SteeringError, OSError, ValueError) as error:
        return {"setting": str(setting), "failure": f"{type(error).__name__}: {error}"}


def failed(results: list[dict[str, Any]]) -> list[str]:
    """The settings that could not be measured, or whose prediction is off."""
    return [found["setting"] for found in results if "failure" in found or abs(found["error"]) > LIMIT]


if __name__ == "__main__":
    if "--train" in sys.argv[1:2]:
        train_and_measure(sys.argv[3:], Path(sys.argv[2]))
    else:
        typer.run(main)
