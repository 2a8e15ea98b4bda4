"""Train tiny language models of many families by LLaVA's own train(), load them by its loader, and see what they do.

What has to hold for each family, on LLaVA's pin and with a newer transformers, stands here once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from steered import generate, pictures, strengthen
from tiny_language_models import Family
from tiny_llava import HIDDEN, TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin import attach, attachment_of, remove, save_adapter
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.pool.pool import AdapterPool

MORES = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all", "mores_dropout": 0.1}
MIXLORA = {"tuning_mode": "mixlora", "mixlora_factors": 4, "mixlora_rank": 2}
PEFT = {"tuning_mode": "peft", "peft_method": "lora"}
TWO_STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0}
# Types that LLaVA has a class for: a component is asked for by its name.
NAMED = ("smollm2", "mistral")


class Trainings:
    """Trains families in this process; what was trained with the same flags is not trained again.

    Args:
        bases: a plain language model of each family, by its name.
        folder: makes an empty folder with a name.
    """

    def __init__(self, tiny: TinyLlava, bases: Mapping[str, Path], folder: Callable[[str], Path]):
        self.tiny, self.bases, self.folder = tiny, bases, folder
        self.done: dict[str, Path] = {}

    def flags(self, family: Family, flags: Mapping[str, object]) -> dict[str, object]:
        named = {"language_model": family.name} if family.name in NAMED else {}
        base = {"model_name_or_path": self.bases[family.name], "version": family.version}
        return {**base, **named, **TWO_STEPS, **flags}

    def __call__(self, family: Family, flags: Mapping[str, object], *, output: Path | None = None) -> Path:
        key = f"{family.name} {sorted(flags.items())}"
        if output is None and key in self.done:
            return self.done[key]
        folder = output or self.folder(family.name) / "out"
        train_in_process(train_flags(self.tiny, folder, self.flags(family, flags)))
        self.done[key] = folder
        return folder


def load(path: Path, base: Path | None = None, name: str = "any", **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer, in float32, by LLaVA's own loader under a name that tells nothing."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, _, _ = load_pretrained_model(str(path), base and str(base), name, device="cpu", **options)
    if not options:
        model = model.float()
    model.get_vision_tower().float()
    return model, tokenizer


def prompt_of(family: Family, tokenizer: Any) -> torch.Tensor:
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    chat = conv_templates[family.version].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat color is the circle?")
    chat.append_message(chat.roles[1], None)
    ids: torch.Tensor = tokenizer_image_token(chat.get_prompt(), tokenizer, return_tensors="pt")
    return ids[None]


def check_trained_and_answers(family: Family, folder: Path, mode: str) -> None:
    """An adapter is loaded bit for bit as it was trained, at least half of it has moved, and its model answers."""
    described = json.loads((folder / "llava_steering_config.json").read_text())
    assert described["conversation"] == family.version
    model, tokenizer = load(folder)
    assert model.config.model_type == f"llava_{family.name}"
    attachment = attachment_of(model)
    assert attachment is not None and attachment.mode.name == mode
    stored = load_file(folder / "adapter_model.safetensors")
    trained = attachment.parameters()
    for name, value in trained.items():  # PEFT's names have a longer beginning
        (found,) = [each for key, each in stored.items() if key.endswith(f".{name}")]
        assert torch.equal(value, found)
    zero = ("shift", "offset", "routed_b", "lora_B.weight")
    begun_at_zero = [value for name, value in trained.items() if name.endswith(zero)]
    # Of MoReS' last layer, nothing reaches the loss: it steers visual tokens, and answers come after them.
    assert sum(bool(value.any()) for value in begun_at_zero) >= len(begun_at_zero) / 2 > 0
    ids = prompt_of(family, tokenizer)
    assert len(generate(model, ids, pictures(1))[0]) >= 6


def check_resumed(train: Trainings, family: Family, flags: Mapping[str, object], part: Path) -> None:
    """A training that goes on from its first checkpoint ends bit for bit where the whole one ended."""
    whole = train(family, flags)
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("checkpoint-2", "adapter_model*", "trainer_state*"))
    train(family, flags, output=part)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, part))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_planned(train: Trainings, family: Family, flags: Mapping[str, object]) -> None:
    """A plan counts, from config.json alone, the parameters that a training trains."""
    from llava_steering_plugin.planning.plan import plan

    named = {**train.flags(family, flags), "language_model": family.name}
    planned = plan(train_flags(train.tiny, Path("nowhere"), named))
    assert planned.problems == ()
    attachment = attachment_of(load(train(family, flags))[0])
    assert attachment is not None and planned.counts is not None
    assert planned.counts.mode == sum(value.numel() for value in attachment.parameters().values())
    linears = {path.rpartition(".")[2] for layer in attachment.shape.layers for path in layer.linears}
    assert len(linears) == family.hosts
    assert attachment.shape.hidden_size == HIDDEN


def check_rows(family: Family, folder: Path, place: Path) -> None:
    """Rows of one batch go through two adapters and none, and come out as each does alone."""
    model, tokenizer = load(folder)
    remove(model)
    kinds = {"cats": MoReS(rank=2, tokens="all"), "pets": MixLoRA(factors=4, rank=2, alpha=1.0)}
    for seed, (name, mode) in enumerate(kinds.items()):
        strengthen(attach(model, mode), seed)
        save_adapter(model, place / name)
        remove(model)
    pool = AdapterPool(model, tokenizer)
    for name in kinds:
        pool.load(name, place / name)
    ids, images = prompt_of(family, tokenizer), pictures(3)
    names = ["cats", "__base__", "pets"]
    with torch.inference_mode():
        together = model(input_ids=ids.repeat(3, 1), images=images, adapter_names=names).logits
        alone = [
            model(input_ids=ids, images=images[row : row + 1], adapter_names=names[row]).logits for row in range(3)
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[2], atol=1e-2)
    made = generate(model, ids.repeat(3, 1), images, adapter_names=names)
    assert [row[-6:] for row in made] == [
        generate(model, ids, images[row : row + 1], adapter_names=names[row])[0][-6:] for row in range(3)
    ]
