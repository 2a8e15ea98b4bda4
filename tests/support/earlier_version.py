"""Makes adapters, answers and checkpoints with whatever version of the package is on the path.

    python earlier_version.py PACKAGE TINY OUT

PACKAGE is the folder that holds the package to use, TINY the tiny LLaVA, OUT gets the results. It needs nothing of the
package but what every version has, and the tests do the same with the present one.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_llava import IMAGE_SIDE, TinyLlava
from torch import Tensor
from training_runs import train_flags, train_in_process

ADDED = {"[PAD]": 700, "<im_start>": 701, "<im_end>": 702}
# What each adapter consists of: its mode, the settings, whether it brings a projector, and whether tokens.
ADAPTERS: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    "mores": ("mores", {"rank": 2, "tokens": "f4+l5", "modality": "vis+text"}, True, False),
    "mixlora": ("mixlora", {"factors": 4, "rank": 2, "start_layer": 2}, True, False),
    "with-tokens": ("mores", {"rank": 1, "tokens": "all"}, False, True),
}
# The first one goes on in its first epoch and ends in the second; the other stays in its first.
TRAININGS: dict[str, dict[str, object]] = {
    "mores": {"tuning_mode": "mores", "mores_rank": 2, "mores_dropout": 0.1, "per_device_train_batch_size": 8},
    "mixlora": {"tuning_mode": "mixlora", "mixlora_factors": 4, "mixlora_rank": 2},
}
STOPPED_AT = 2


def load_llava(folder: Path) -> Any:
    """Load the LLaVA in `folder` with its tower, in float32 and eval mode."""
    from llava.model import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    return model.float().eval()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, use_fast=False)


def answer(model: Any, name: str, **named: str) -> dict[str, Tensor]:
    """Ask one question with one image: the logits of the prompt, and what is generated."""
    generator = torch.Generator().manual_seed(0)
    words = [701] if name == "with-tokens" else []
    ids = torch.tensor([[1, *words, 301, 302, -200, 303, 304, 305, 306]])
    images = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
    with torch.inference_mode():
        logits = model(input_ids=ids, images=images, **named).logits
        tokens = model.generate(ids, images=images, do_sample=False, max_new_tokens=8, min_new_tokens=8, **named)
    return {"logits": logits.clone(), "tokens": tokens.clone()}


def load_by_upstream(folder: Path) -> Any:
    """Load an adapter and its base through upstream's loader, in float32."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    path = str(folder)
    return load_pretrained_model(path, None, get_model_name_from_path(path), device="cpu")[1].float()


def training(tiny: TinyLlava, name: str, output: Path) -> list[str]:
    """The flags of a training of four steps that saves after every second one."""
    saving = {"save_strategy": "steps", "save_steps": STOPPED_AT, "max_steps": 2 * STOPPED_AT}
    return train_flags(tiny, output, {**TRAININGS[name], **saving})


def losses(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a training's history that steps have made, without the times."""
    return [entry for entry in history if "loss" in entry]


def adapter_file(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def save(tiny: TinyLlava, name: str, out: Path) -> None:
    """Save a strong adapter and what it answers."""
    from llava_steering_plugin import AdapterConfig, attach, save_adapter

    earlier: Any = importlib.import_module("llava_steering_plugin.adapters.config")  # where it was in that version
    mode, settings, projector, tokens = ADAPTERS[name]
    model = load_llava(tiny.llava)
    attachment = attach(model, mode, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if projector:
            own = {key: value for key, value in model.named_parameters() if "mm_projector" in key}
            attachment.extras |= own.keys()
            for value in own.values():
                value.add_(torch.randn(value.shape, generator=generator) * 0.3)
        if tokens:
            model.resize_token_embeddings(703)
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[700:] = torch.randn(3, layer.weight.shape[1], generator=generator)
    base = earlier.BaseModel(
        str(tiny.llava), "llava_llama", model.config.hidden_size, model.config.num_hidden_layers, 700
    )
    given = ADDED if tokens else {}
    attachment.config = AdapterConfig(mode, attachment.mode.settings(), base, "v1", dict(given))
    save_adapter(model, out / name)
    save_file(answer(model, name), out / f"{name}.safetensors")


def train(tiny: TinyLlava, name: str, out: Path) -> None:
    """Train, and go on from the middle in a folder of its own; another folder waits for the present version to."""
    train_in_process(training(tiny, name, out / "whole" / name))
    for folder in ("resumed", "waiting"):
        checkpoint = f"checkpoint-{STOPPED_AT}"
        shutil.copytree(out / "whole" / name / checkpoint, out / folder / name / checkpoint)
    history = train_in_process(training(tiny, name, out / "resumed" / name))
    (out / f"{name}.json").write_text(json.dumps(losses(history)))


def main(words: Mapping[str, str]) -> None:
    import llava_steering_plugin

    assert Path(llava_steering_plugin.__file__).is_relative_to(words["package"]), "another version was imported"
    tiny, out = TinyLlava(Path(words["tiny"])), Path(words["out"])
    for name in ADAPTERS:
        save(tiny, name, out)
        save_file(answer(load_by_upstream(out / name), name), out / f"{name}-by-upstream.safetensors")
    gc.freeze()  # what was imported is no garbage: every training would look for it there
    for name in TRAININGS:
        train(tiny, name, out)


if __name__ == "__main__":
    main(dict(zip(("package", "tiny", "out"), sys.argv[1:], strict=True)))
