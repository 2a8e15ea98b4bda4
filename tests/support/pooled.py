"""Adapters of several kinds for the tiny LLaVA, saved to disk, and a batch whose rows are as unlike as they can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from steered import IMAGE, PROMPT, generate, ids_of, logits_of, pictures, strengthen, words
from torch import Tensor

from llava_steering_plugin import attach, joint, load_adapter, remove, save_adapter
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.modes.peft.mode import Peft

# Steering everywhere; elsewhere and of text too; chosen factors; chosen anew in every forward, and fewer linears; and
# steering and LoRA, or factors, at once.
MODES: dict[str, Mode] = {
    "cats": MoReS(rank=2, tokens="all"),
    "dogs": MoReS(rank=1, tokens="f4+l5", modality="vis+text", layers="1-2"),
    "pets": MixLoRA(factors=4, rank=2, alpha=1.0),
    "fish": MixLoRA(factors=4, rank=2, alpha=1.0, variant="released", targets="q_proj,down_proj", start_layer=2),
    "birds": MoReS(rank=2, tokens="all"),
    "bats": MixLoRA(factors=4, rank=1, alpha=1.0, conditional=False),
    "moths": joint(MoReS(rank=2, tokens="f4+l5"), Peft("lora", '{"r": 2, "lora_alpha": 2}')),
    "newts": joint(MoReS(rank=2, tokens="f4+l5"), MixLoRA(factors=4, rank=2, alpha=1.0, targets="q_proj,up_proj")),
}
WITH_PROJECTOR = ("birds", "bats")
BASE = "__base__"


def save_all(model: Any, root: Path) -> dict[str, Path]:
    """Saves one strong adapter of each kind; `model` is left as it was."""
    return {name: save(model, root / name, mode, seed) for seed, (name, mode) in enumerate(MODES.items())}


def save(model: Any, folder: Path, mode: Mode, seed: int = 0, *, projector: bool | None = None) -> Path:
    """Saves a strong adapter, with a projector of its own where the kind has one."""
    attachment = strengthen(attach(model, mode), seed)
    own = folder.name in WITH_PROJECTOR if projector is None else projector
    parameters = {
        f"model.mm_projector.{name}": value for name, value in model.get_model().mm_projector.named_parameters()
    }
    before = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        if own:
            attachment.extras |= parameters.keys()
            generator = torch.Generator().manual_seed(100 + seed)
            for value in parameters.values():
                value.data += 0.3 * torch.randn(value.shape, generator=generator)
        save_adapter(model, folder)
    finally:
        for name, value in parameters.items():
            value.data.copy_(before[name])
        remove(model)
    return folder


@contextmanager
def alone(model: Any, folder: Path | None) -> Iterator[Any]:
    """`model` with one adapter as `load_adapter` puts it on, and afterwards as it was."""
    if folder is None:
        yield model
        return
    projector = model.get_model().mm_projector
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    load_adapter(model, folder)
    try:
        yield model
    finally:
        remove(model)
        projector.load_state_dict(before)


class Batch:
    """Rows with no, one and two images, of unequal length, padded on the left.

    Attributes:
        names: the adapter of each row.
        rows: its token ids.
        images: the pictures of each row; a row without a placeholder takes one in a batch, too.
    """

    def __init__(self, names: list[str], seed: int = 0):
        self.names = names
        counts = [(1, 2, 0)[number % 3] for number in range(len(names))]
        self.rows = [self._ids(count, seed * 100 + number) for number, count in enumerate(counts)]
        self.images = [pictures(max(1, count), seed * 100 + number) for number, count in enumerate(counts)]

    @staticmethod
    def _ids(images: int, seed: int) -> list[int]:
        ids = [1, *words(2 + seed % 3, seed)]
        for number in range(images):
            ids += [IMAGE, *words(2 + number, seed + 50)]
        return ids

    def together(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and images of the whole batch."""
        longest = max(map(len, self.rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in self.rows])
        return ids, (ids != 0).long(), torch.cat(self.images)

    def generated(self, model: Any, **options: Any) -> list[list[int]]:
        ids, attention, images = self.together()
        return generate(model, ids, images, attention_mask=attention, **options)

    def generated_alone(self, model: Any, row: int, **options: Any) -> list[list[int]]:
        return generate(model, torch.tensor([self.rows[row]]), self.images[row], **options)

    def logits(self, model: Any, **options: Any) -> Tensor:
        ids, attention, images = self.together()
        return logits_of(model, ids, images, attention_mask=attention, **options)

    def logits_alone(self, model: Any, row: int) -> Tensor:
        ids = torch.tensor([self.rows[row]])
        return logits_of(model, ids, self.images[row], attention_mask=torch.ones_like(ids))[0]


def hooks_of(model: Any) -> int:
    """How many forward hooks there are in the whole model."""
    return sum(len(module._forward_hooks) for module in model.modules())


def answer(model: Any, name: str | None = None) -> list[list[int]]:
    """The answer to one question with one picture, of an adapter of the model's pool."""
    named = {"adapter_names": name} if name is not None else {}
    return generate(model, ids_of(PROMPT), pictures(1), do_sample=False, **named)
