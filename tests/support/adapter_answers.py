"""What adapters answer in a process that has another version of this package. Run as a script:

    adapter_answers.py BASE OUTPUT [--save MODE FOLDER]... [--load FOLDER BASE_OR_EMPTY]...

It saves adapters of BASE, loads adapters as upstream's programs do, and writes the logits of each, in order, to OUTPUT.
Only public names are used: they are the same in all versions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

IMAGE = -200
SETTINGS: dict[str, dict[str, Any]] = {"mores": {"rank": 2, "tokens": "all"}, "mixlora": {"rank": 2, "factors": 4}}


def save(base: str, mode: str, folder: str, seed: int) -> None:
    """Save a strong adapter on the LLaVA in `base`, with its projector."""
    from llava.model import LlavaLlamaForCausalLM

    from llava_steering_plugin import attach, save_adapter

    model = LlavaLlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    attachment = attach(model, mode, **SETTINGS[mode])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    attachment.extras |= {name for name, _ in model.named_parameters() if "mm_projector" in name}
    save_adapter(model, folder)


def logits(folder: str, base: str | None) -> torch.Tensor:
    """Return the logits of a fixed question with the adapter in `folder`, loaded as upstream's programs load it."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    torch.manual_seed(0)
    _, model, _, _ = load_pretrained_model(folder, base, get_model_name_from_path(folder), device="cpu")
    side = model.get_vision_tower().config.image_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, side, side, generator=generator).to(model.dtype)
    with torch.inference_mode():
        answer: torch.Tensor = model(input_ids=torch.tensor([[1, 300, IMAGE, 301, 302]]), images=image).logits
    return answer.contiguous()


def main(words: list[str]) -> None:
    base, output, *rest = words
    found = {}
    for kind, one, other in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        if kind == "--save":
            save(base, one, other, seed=len(other))
        else:
            found[str(len(found))] = logits(one, other or None)
    save_file(found, Path(output))


if __name__ == "__main__":
    main(sys.argv[1:])
