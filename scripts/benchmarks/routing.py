"""Measure how often MixLoRA selects other factors in a later turn of a chat than in training.

    python scripts/benchmarks routing ADAPTER --data conversations.json --pictures FOLDER [--json FILE]

In training, a conversation is one row, and the tokens before its first answer route it. In a chat, every question is a
generation of its own, and its whole prompt routes it, earlier questions and answers included. Here both are one
forward over the same tokens: the supervised labels say where the prompt ends. Earlier answers are the data's own.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from llava_steering_plugin.adapters.attachment import required

from .shared.choices import choices
from .shared.machine import open_console
from .shared.verdicts import write_json

IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """The figures of one turn, over all conversations that have it. Shares are from 0 to 1.

    Attributes:
        number: 1 for the first question.
        conversations: the number of conversations.
        same_sets: share of the routers' choices that hold the same factors as in training.
        kept: share of the factors chosen in training that are also chosen in the chat.
        others: the same, against the choice in training of another conversation: what two questions share by chance.
        right_as_trained, right_in_chat: share of answers of which every token is the likeliest, by either choice.
        same_answers: share of answers whose likeliest tokens are the same by both choices.
    """

    number: int
    conversations: int
    same_sets: float
    kept: float
    others: float
    right_as_trained: float
    right_in_chat: float
    same_answers: float


def answers_in(labels: Tensor) -> list[slice]:
    """Return the runs of supervised positions in `labels` [positions], one for each answer."""
    supervised = torch.nn.functional.pad((labels != IGNORED).int(), (1, 1))
    change = supervised.diff()
    starts, ends = (change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist()
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def rows_of(labels: Tensor) -> Tensor:
    """Return labels [1 + turns, positions]: all answers supervised, as in training; then each answer alone."""
    rows = [labels]
    for answer in answers_in(labels):
        alone = torch.full_like(labels, IGNORED)
        alone[answer] = labels[answer]
        rows.append(alone)
    return torch.stack(rows)


@torch.inference_mode()
def look(model: Any, ids: Tensor, labels: Tensor, pixels: Tensor) -> tuple[Tensor, list[list[list[int]]]]:
    """Run one conversation, once for every row of `rows_of`.

    Args:
        ids, labels: [positions], as upstream's preprocessing gives them, with one image.
        pixels: [1, channels, height, width].

    Returns:
        The choices, bool [rows, routers, E], and for every row the likeliest tokens of every answer.
    """
    rows = rows_of(labels)
    same = [len(rows), *[-1] * ids.dim()]
    with choices(required(model).modules) as chosen:
        logits = model(input_ids=ids.expand(same), labels=rows, images=pixels.expand(len(rows), -1, -1, -1)).logits
    # Positions after the image are shifted by its features; the token before a position predicts it.
    moved = logits.shape[1] - len(ids) - 1
    likeliest = logits.argmax(-1)
    answers = answers_in(labels)
    said = [[row[answer.start + moved : answer.stop + moved].tolist() for answer in answers] for row in likeliest]
    return torch.stack(list(chosen.values()), 1), said


def summary(found: Sequence[tuple[Tensor, Tensor, list[list[list[int]]]]]) -> list[Turn]:
    """Return the figures by turn.

    Args:
        found: for every conversation its labels and the results of `look`.
    """
    sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(7, dtype=torch.float64))
    for place, (labels, chosen, said) in enumerate(found):
        other = found[place - 1][1][0]
        trained, rank = chosen[0], chosen[0].sum(-1)
        for turn, answer in enumerate(answers_in(labels)):
            chat, expected = chosen[turn + 1], labels[answer].tolist()
            as_trained, in_chat = said[0][turn], said[turn + 1][turn]
            figures: tuple[float, ...] = (
                float((trained == chat).all(-1).double().mean()),
                float(((trained & chat).sum(-1) / rank).mean()),
                float(((other & chat).sum(-1) / rank).mean()),
                as_trained == expected,
                in_chat == expected,
                as_trained == in_chat,
            )
            sums[turn] += torch.tensor([1.0, *figures], dtype=torch.float64)
    return [Turn(turn + 1, int(total[0]), *(total[1:] / total[0]).tolist()) for turn, total in sorted(sums.items())]


def conversations(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` conversations of several turns about one image, the same for the same seed."""
    read = json.loads(data.read_text(encoding="utf-8"))
    several = [sample for sample in read if "image" in sample and len(sample["conversations"]) > 2]
    return random.Random(seed).sample(several, min(count, len(several)))


def run(
    adapter: Path, data: Path, pictures: Path, template: str, count: int, seed: int, json_file: Path | None
) -> None:
    """Run the measurement and print its table."""
    from llava import conversation
    from llava.mm_utils import get_model_name_from_path, process_images
    from llava.model.builder import load_pretrained_model
    from llava.train.train import DataArguments, preprocess, preprocess_multimodal

    name = get_model_name_from_path(str(adapter))
    tokenizer, model, processor, _ = load_pretrained_model(str(adapter), None, name, device="cpu")
    # The loader returns half precision, which is slow on a CPU.
    model = model.float().eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token  # as upstream's train() does
    conversation.default_conversation = conversation.conv_templates[template]
    arguments = DataArguments()
    arguments.is_multimodal, arguments.mm_use_im_start_end = True, False
    found = []
    for sample in conversations(data, count, seed):
        sources = preprocess_multimodal([sample["conversations"]], arguments)
        made = preprocess(sources, tokenizer, has_image=True)
        picture = Image.open(pictures / sample["image"]).convert("RGB")
        pixels = process_images([picture], processor, model.config).float()
        found.append((made["labels"][0], *look(model, made["input_ids"][0], made["labels"][0], pixels)))
    turns = summary(found)
    mode = required(model).mode
    open_console(160).print(_table(turns, f"{adapter}: {mode.settings()}"))
    if json_file is not None:
        write_json(json_file, {"settings": mode.settings(), "turns": turns})


def _table(turns: Sequence[Turn], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    headings = ("turn", "conversations", "same sets", "factors kept", "of another's", "right as trained", "in a chat")
    for heading in (*headings, "same answers"):
        table.add_column(heading, justify="right")
    for turn in turns:
        number, conversations, *shares = asdict(turn).values()
        table.add_row(str(number), str(conversations), *(f"{share:.1%}" for share in shares))
    return table
