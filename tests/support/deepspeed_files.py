"""DeepSpeed's settings as upstream writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
STAGE_3 = {
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
ON_CPU = {"device": "cpu", "pin_memory": True}
OFFLOAD = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "gradient_clipping": "auto",
    "steps_per_print": 1e5,
    "wall_clock_breakdown": False,
}


def zero(folder: Path, stage: int, *, gather: bool = True, offload: bool = False) -> Path:
    """DeepSpeed's settings with the keys and values of upstream's zero2.json, zero3.json or zero3_offload.json."""
    optimization: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        # Upstream writes the last one with its prefix in zero3.json and without in zero3_offload.json.
        optimization |= {**STAGE_3, f"{'' if offload else 'stage3_'}gather_16bit_weights_on_model_save": gather}
    if offload:
        optimization |= {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}
    settings: dict[str, Any] = {
        "fp16": FP16,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": optimization,
        **(OFFLOAD if offload else {}),
    }
    path = folder / f"zero{stage}{'' if gather else '-no-gather'}{'-offload' if offload else ''}.json"
    path.write_text(json.dumps(settings))
    return path
