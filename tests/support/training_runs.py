"""Upstream's train() over the tiny LLaVA: its flags, and running it in a fresh Python or in this one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_llava import TinyLlava

TRAIN_CODE = "from llava.train.train import train; train()"


def train_flags(tiny: TinyLlava, output_dir: Path, overrides: Mapping[str, object] | None = None) -> list[str]:
    """Upstream's flags for full tuning of `tiny.llava` on this machine's CPU, as a list.

    `overrides` maps flag names without dashes to values; None removes a flag.
    """
    flags: dict[str, object] = {
        "model_name_or_path": tiny.llava,
        "version": "v1",
        "data_path": tiny.data,
        "image_folder": tiny.images,
        "vision_tower": tiny.tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "bf16": True,
        "output_dir": output_dir,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 512,
        "gradient_checkpointing": True,
        "dataloader_num_workers": 0,
        "lazy_preprocess": True,
        "report_to": "none",
        "use_cpu": True,
    }
    flags.update(overrides or {})
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def stage_1_overrides(tiny: TinyLlava) -> dict[str, object]:
    """What turns `train_flags` into LLaVA-1.5's stage 1: the projector alone, over the plain LLM."""
    return {
        "model_name_or_path": tiny.llm,
        "data_path": tiny.captions,
        "version": "plain",
        "tune_mm_mlp_adapter": True,
        "group_by_modality_length": None,
    }


def plain_llm_overrides(tiny: TinyLlava) -> dict[str, object]:
    """What turns `train_flags` into LLaVA-1.5's stage 2: a plain LLM with the projector of stage 1."""
    return {"model_name_or_path": tiny.llm, "pretrain_mm_mlp_adapter": tiny.projector}


def with_other_weights(source: Path, target: Path) -> Path:
    """A copy of a LLaVA with the same shapes and other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    (weights,) = target.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    return target


# Four steps of MoReS with dropout, and a checkpoint after each second one; the last is in the middle of an epoch.
FOUR_STEPS: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 2,
    "mores_tokens": "all",
    "mores_dropout": 0.1,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}
LORA: dict[str, object] = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 2e-4}


def subprocess_environment(llava: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment for a child process: offline, one thread, no GPU, so the same numbers everywhere.

    `llava` is the folder that holds the llava package to import; it comes before anything installed.
    """
    paths = [str(llava), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",  # peft writes sets of names, in the order of the hashes
        "WANDB_DISABLED": "true",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def run_train(
    flags: Sequence[str],
    llava: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs upstream's train() in a fresh Python, by default in the folder above --output_dir.

    `llava` is the folder that holds the llava package.

    Raises:
        RuntimeError: with the end of the output, if it failed and `check` is on.
    """
    # Not in the caller's folder: Python puts it first on the path with -c, and a llava/ there would win.
    cwd = cwd or Path(_first_flag(flags, "--output_dir") or ".").resolve().parent
    cwd.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_CODE, *flags],
        env=subprocess_environment(llava, env),
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
    )
    if check and done.returncode:
        raise RuntimeError(f"training ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done


def train_in_process(flags: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Runs the train() of the llava imported here and returns the log history.

    Upstream keeps the conversation template, its rank and the command line in globals; they are put back.
    """
    import torch

    with upstream_globals_restored():
        from llava.train import train as upstream

        sys.argv = ["train.py", *flags]
        # The projector and LoRA are drawn before the Trainer seeds anything.
        torch.manual_seed(seed)
        upstream.train()
    output = _first_flag(flags, "--output_dir")
    if output is None:
        raise ValueError("flags without --output_dir")
    return list(json.loads((Path(output) / "trainer_state.json").read_text())["log_history"])


@contextlib.contextmanager
def upstream_globals_restored() -> Iterator[None]:
    """Puts sys.argv, upstream's default conversation, its rank and the precision of the run back at the end."""
    from accelerate.state import AcceleratorState
    from llava import conversation
    from llava.train import train as upstream

    argv, default, rank = sys.argv, conversation.default_conversation, upstream.local_rank
    try:
        yield
    finally:
        sys.argv, conversation.default_conversation, upstream.local_rank = argv, default, rank
        # accelerate remembers the first run's precision for the process, and transformers hands it on by environment.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def _first_flag(flags: Sequence[str], name: str) -> str | None:
    return flags[list(flags).index(name) + 1] if name in flags else None
