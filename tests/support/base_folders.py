"""Folders that have the files of a base or of an adapter, made in a moment, of no use but to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.stored.folder import HEADER

LLAVA = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip", "hidden_size": 64, "num_hidden_layers": 4}


def base_folder(folder: Path, **settings: Any) -> Path:
    """Make a folder with the files of a LLaVA, of no use but to look at."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAVA | settings))
    save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


def adapter_folder(folder: Path, conversation: str = "v1", hidden_size: int = 64, mode: str = "mores") -> Path:
    """Make a folder that looks like an adapter, without its tensors."""
    folder.mkdir()
    config = AdapterConfig(mode, {}, BaseModel("a/base", "llava_llama", hidden_size, 4, 100), conversation)
    header = {HEADER: config.to_json()}
    save_file({"adapter.x": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors", header)
    return folder
