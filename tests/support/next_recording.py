"""Record what LLaVA-NeXT computes, for tests in environments without it.

`.venv-next/bin/python tests/support/next_recording.py` writes tests/golden/next.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import next_golden
import torch
from next_golden import CASES, FAMILIES, FRAMES, LAST, SIDE, SIZES, TILES
from torch import Tensor

from llava_steering_plugin import attach
from llava_steering_plugin.hooks.scope import current

VISION = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 64,
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[2 * SIDE, 2 * SIDE]],
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
}


def model_of(family: str, tower: Path) -> Any:
    """Return LLaVA-NeXT's own class of a family, with the values that follow from names."""
    module = import_module(f"llava.model.language_model.llava_{family}")
    kind = {"llama": "LlavaLlamaForCausalLM", "qwen": "LlavaQwenForCausalLM"}[family]
    config = getattr(module, kind).config_class(**SIZES, **VISION, mm_vision_tower=str(tower))
    config._attn_implementation = "eager"
    model = getattr(module, kind)(config).eval()
    next_golden.fill({name: each for name, each in model.named_parameters() if "vision_tower" not in name})
    return model


def pictures(kind: str) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(7)
    counts = {"image": [1], "tiles": [1 + TILES], "two": [1, 1], "video": [FRAMES]}[kind]
    return {
        "images": [torch.randn(count, 3, SIDE, SIDE, generator=drawn) for count in counts],
        "image_sizes": [(100, 112)] * len(counts),
        "modalities": ["video" if kind == "video" else "image"] * len(counts),
    }


def recorded(family: str, tower: Path) -> dict[str, Tensor]:
    """Return the tensors of a family by "CASE/NAME"."""
    model = model_of(family, tower)
    next_golden.fill(attach(model, "mores", rank=1, tokens="all").trained())
    found: dict[str, Tensor] = {}

    def keep(stack: Any, args: Any, kwargs: dict[str, Any]) -> None:
        scope = current()
        assert scope is not None and scope.tokens is not None
        found[f"{case}/embeddings"] = kwargs["inputs_embeds"][0].detach().clone()
        found[f"{case}/visual"] = scope.tokens.visual[0]

    hook = model.get_model().register_forward_pre_hook(keep, with_kwargs=True)
    for case, (ids, kind) in CASES.items():
        with torch.no_grad():
            logits = model(torch.tensor([ids]), **pictures(kind)).logits
        found[f"{case}/logits"] = logits[0, -LAST:].contiguous()
    hook.remove()
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file
    from tiny_llava import build

    with tempfile.TemporaryDirectory() as scratch:
        tiny = build(Path(scratch))
        next_golden.FOLDER.mkdir(parents=True, exist_ok=True)
        for name in FAMILIES:
            save_file(recorded(name, tiny.tower), next_golden.FOLDER / f"{name}.safetensors")
