"""Unmerged LoRAs as upstream's training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_lora(model: Any, folder: Path, base: Path | None) -> Path:
    """Saves a strong LoRA over `model`, which is not to be used afterwards; `base` is the base that it names."""
    from peft import LoraConfig, get_peft_model

    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=projections, task_type="CAUSAL_LM")
    model.config._name_or_path = model.name_or_path = str(base or "")
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    tuned.save_pretrained(folder)
    model.config.save_pretrained(folder)
    projector = {name: value.detach() for name, value in tuned.named_parameters() if "mm_projector" in name}
    torch.save(projector, folder / "non_lora_trainables.bin")
    return folder
