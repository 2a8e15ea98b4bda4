"""Tiny random vision towers on disk, as transformers and timm save them: SigLIP and DINOv2 for images of 56 pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tiny_llava import IMAGE_SIDE, PATCH, TinyLlava

HALF = [0.5, 0.5, 0.5]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIDE = IMAGE_SIDE // PATCH


@dataclass(frozen=True)
class TinyTowers:
    """Where the towers are; `clip` is that of the tiny LLaVA, of width 64."""

    root: Path
    clip: Path

    @property
    def siglip(self) -> str:
        """Of width 48."""
        return f"siglip:{self.root / 'siglip'}"

    @property
    def dinov2(self) -> str:
        """Of width 32."""
        return f"dinov2:{self.root / 'dinov2'}"

    @property
    def mof(self) -> str:
        return f"mof:{self.clip}+{self.root / 'dinov2'}"


def build_towers(root: Path, tiny: TinyLlava, seed: int = 0) -> TinyTowers:
    """Write the towers below `root`."""
    import torch
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        Dinov2Model,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    towers = TinyTowers(root, tiny.tower)
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": PATCH, "image_size": IMAGE_SIDE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Both halves, as it is released.
        text = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
        }
        vision = {**small, "hidden_size": 48, "intermediate_size": 96}
        SiglipModel(SiglipConfig(text, vision)).save_pretrained(root / "siglip")
        # Position embeddings for larger images than the processor cuts out, as released: they are interpolated.
        config = Dinov2Config(**{**small, "hidden_size": 32, "mlp_ratio": 2, "image_size": 2 * IMAGE_SIDE})
        Dinov2Model(config).save_pretrained(root / "dinov2")
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    SiglipImageProcessor(size=side, image_mean=HALF, image_std=HALF).save_pretrained(root / "siglip")
    size = {"shortest_edge": IMAGE_SIDE + 8}
    BitImageProcessor(size=size, crop_size=side, resample=3, **IMAGENET).save_pretrained(root / "dinov2")
    return towers


def build_timm(folder: Path, seed: int = 0) -> str:
    """Write a tiny ViT in timm's layout of the hub, and return its name for --vision_tower."""
    import timm
    import torch
    from safetensors.torch import save_file

    arguments = {"img_size": IMAGE_SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments)
    data = {"input_size": [3, IMAGE_SIDE, IMAGE_SIDE], "mean": HALF, "std": HALF, "interpolation": "bicubic"}
    folder.mkdir(parents=True)
    described = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": data}
    (folder / "config.json").write_text(json.dumps(described))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return f"timm:{folder}"
