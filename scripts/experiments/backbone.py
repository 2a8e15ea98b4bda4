"""Build the parts of a LLaVA: a vision tower that is trained on the pictures, a tokenizer and a language model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from experiments.settings import IMAGE_SIDE, PATCH, SEED
from experiments.world import COLOURS, SHAPES, Split, seen_in, sentences

TOWER_WIDTH, WIDTH, LAYERS, PIECES = 64, 128, 4, 700
UNKNOWN = -100


def build_tower(folder: Path, epochs: int, report: Callable[[int, int], None]) -> dict[str, float]:
    """Train a CLIP vision tower to tell colours and shapes apart, and save it in the form that upstream loads.

    Returns:
        Accuracy on the test pictures, by "colour" and "shape".
    """
    torch.manual_seed(SEED)
    # The pictures already have the right size and mode, and each step of transformers' processor costs milliseconds.
    processor = CLIPImageProcessor(
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
    )
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=TOWER_WIDTH,
            intermediate_size=4 * TOWER_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIDE,
            patch_size=PATCH,
            projection_dim=TOWER_WIDTH,
        )
    )
    heads = nn.ModuleDict(
        {"colour": nn.Linear(TOWER_WIDTH, len(COLOURS)), "shape": nn.Linear(TOWER_WIDTH, len(SHAPES))}
    )
    # Predicts the mean colour of each patch: such features serve every camera, not only the labelled one.
    patch_colour = nn.Linear(TOWER_WIDTH, 3)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *heads.parameters(), *patch_colour.parameters()], lr=1e-3, weight_decay=0.01
    )
    pixels, labels = _pixels("train", processor)
    batch, total = 64, epochs * (len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=total)
    for step in range(total):
        chosen = torch.randint(len(pixels), (batch,))
        seen = pixels[chosen]
        for axis in (2, 3):
            flip = torch.rand(batch) < 0.5
            seen[flip] = seen[flip].flip(axis)
        patches = _patches(tower, seen)
        loss = nn.functional.mse_loss(patch_colour(patches), nn.functional.avg_pool2d(seen, PATCH).flatten(2).mT)
        for kind, head in heads.items():
            loss = loss + nn.functional.cross_entropy(head(patches.mean(1)), labels[kind][chosen], ignore_index=UNKNOWN)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == total - 1:
            report(step + 1, total)
    tower.save_pretrained(folder)
    processor.save_pretrained(folder)
    return _accuracy(tower.eval(), heads, *_pixels("test", processor))


def _classified(tower: CLIPVisionModel, heads: nn.ModuleDict, pixels: Tensor) -> dict[str, Tensor]:
    patches = _patches(tower, pixels)
    return {kind: head(patches.mean(1)) for kind, head in heads.items()}


def _patches(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    # LLaVA sees the patches of the last hidden state, so these must hold the labels.
    patches: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return patches


@torch.no_grad()
def _accuracy(
    tower: CLIPVisionModel, heads: nn.ModuleDict, pixels: Tensor, labels: dict[str, Tensor]
) -> dict[str, float]:
    found = {}
    for kind, logits in _classified(tower, heads, pixels).items():
        known = labels[kind] != UNKNOWN
        found[kind] = float((logits.argmax(1)[known] == labels[kind][known]).float().mean())
    return found


def _pixels(name: str, processor: CLIPImageProcessor) -> tuple[Tensor, dict[str, Tensor]]:
    split = Split.load(name)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in split.pictures.values()]
    known = seen_in(split.questions)
    labels = {
        kind: torch.tensor([_index(words, known.get(number, (None, None))[place]) for number in split.pictures])
        for place, (kind, words) in enumerate((("colour", COLOURS), ("shape", SHAPES)))
    }
    return processor(pictures, return_tensors="pt")["pixel_values"], labels


def _index(words: tuple[str, ...], word: str | None) -> int:
    return words.index(word) if word is not None else UNKNOWN


def build_language_model(folder: Path) -> None:
    """Save a plain, untrained Llama with a tokenizer that is made from all texts of the experiments."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=pieces,
        vocab_size=PIECES,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(pieces.getvalue())
    # legacy: text after </s> gets the same leading piece as at the start; upstream's masking relies on it.
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True, model_max_length=512)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
