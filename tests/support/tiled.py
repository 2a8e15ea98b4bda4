"""The tiny LLaVA as a LLaVA-1.6: pictures in tiles, and a token behind each line of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_llava import HIDDEN, TinyLlava

# Of no square picture the same tiles with its sides exchanged, so that these are told apart.
GRID = [[56, 112], [112, 56], [112, 112], [168, 56]]
LAYOUT = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": GRID}


def build(tiny: TinyLlava, folder: Path) -> Path:
    """Write it into the new folder, and return that."""
    shutil.copytree(tiny.llava, folder)
    config = json.loads((folder / "config.json").read_text()) | LAYOUT
    (folder / "config.json").write_text(json.dumps(config))
    newline = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).half()
    tensors = load_file(folder / "model.safetensors") | {"model.image_newline": newline}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
