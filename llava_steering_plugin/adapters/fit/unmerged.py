"""Refuse bases that are adapters of PEFT's, not merged: their projector would be dropped without a word."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.stored.config import is_ours
from llava_steering_plugin.adapters.stored.folder import PEFT_CONFIG
from llava_steering_plugin.errors import BaseMismatch
from llava_steering_plugin.foreign_files import read_json


def unmerged_lora(name: str) -> str | None:
    """Return what to do about a base that is an adapter of PEFT's, a LoRA above all; None if it is none.

    transformers would load the base that the adapter names, and the LoRA; the projector that LLaVA has trained with it
    (non_lora_trainables.bin) would be left out, without a word. Only local files are looked at.

    Args:
        name: a folder, or a model on the hub.
    """
    from huggingface_hub import try_to_load_from_cache

    file: Any = Path(name).expanduser() / PEFT_CONFIG
    if not os.path.isdir(Path(name).expanduser()):
        file = None
        with suppress(ValueError):  # no name of a model
            file = try_to_load_from_cache(name, PEFT_CONFIG)
    try:
        described = read_json(file) if isinstance(file, str | Path) else None
    except (OSError, ValueError):
        return None
    if not isinstance(described, dict) or is_ours(described.get("peft_type")):
        return None
    base = described.get("base_model_name_or_path") or "ITS_BASE"
    return (
        f"{name} is an unmerged {described.get('peft_type', 'LORA')} of {base}: the projector that was trained with it "
        "would be left out. Merge it first, with LLaVA's scripts/merge_lora_weights.py "
        f"--model-path {name} --model-base {base} --save-model-path MERGED, and give MERGED"
    )


def refuse_unmerged(model: Any) -> None:
    """Refuse a model that transformers has loaded from an unmerged LoRA, so that its projector is another one.

    Raises:
        BaseMismatch: it is one; says what to do.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    for described in getattr(model, "peft_config", {}).values():
        raise BaseMismatch(
            f"this model is an unmerged LoRA of {described.base_model_name_or_path}; an adapter needs a base of its "
            "own. Load the LoRA with LLaVA's load_pretrained_model, which merges it and loads its projector."
        )
