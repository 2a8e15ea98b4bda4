"""PEFT's methods as adapters of the tiny LLaVA, and the same by PEFT's own wrapper around the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_steering_plugin.modes.peft.mode import Peft

# By name: the method, and settings in which its options show.
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4, "lora_alpha": 8}),
    "rslora": (
        "lora",
        {"r": 4, "use_rslora": True, "target_modules": r".*\.[1-2]\..*(q|v)_proj", "rank_pattern": {"q_proj": 2}},
    ),
    "dora": ("lora", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "ia3": ("ia3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "oft": ("oft", {"r": 8, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "loha": ("loha", {"r": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}),
    "lokr": (
        "lokr",
        {"r": 2, "decompose_both": True, "decompose_factor": 4, "target_modules": ["q_proj", "down_proj"]},
    ),
}


TRAINED = ["lora", "dora", "ia3", "oft", "loha", "lokr"]
DROPOUT = {"lora": {"lora_dropout": 0.1}, "dora": {"lora_dropout": 0.1}, "loha": {"rank_dropout": 0.1}}


def flags_of(name: str) -> dict[str, object]:
    """Flags of four steps with random numbers in each, and a checkpoint after the second one."""
    method, config = BASELINES[name]
    return {
        "tuning_mode": "peft",
        "peft_method": method,
        "peft_config": json.dumps(config | DROPOUT.get(name, {})),
        "freeze_mm_mlp_adapter": True,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }


def baseline(name: str, **further: Any) -> Peft:
    """The mode of that name, with further settings of PEFT's."""
    method, config = BASELINES[name]
    return Peft(method, json.dumps(config | further))


def by_peft(model: nn.Module, folder: Path) -> Any:
    """The model with the adapter in `folder`, as PEFT's own loader puts it on, in training mode where the model is."""
    from peft import PeftModel

    training = model.training
    tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return tuned.train(training)


def moved(parameters: Any, seed: int = 0, size: float = 0.1) -> None:
    """Move parameters away from where they are, so that nothing is the identity and IA3 stays near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
