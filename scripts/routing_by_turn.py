"""How often MixLoRA chooses other factors in a later turn of a chat than it was trained with.

    python scripts/routing_by_turn.py ADAPTER --data conversations.json --pictures FOLDER [--json FILE]

In training, a conversation is one row and is routed by what stands before its first answer. In a chat, every question
is a generation of its own, routed by its whole prompt, in which earlier questions and answers stand too. Both are one
forward here, over the same tokens: what is supervised says where the prompt ends. Earlier answers are the data's own.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.modes.base import Pass
from llava_steering_plugin.modes.mixlora import RoutedLinear

IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """What was found of one turn, over all conversations that have it. Shares from 0 to 1.

    Attributes:
        number: 1 for the first question.
        conversations: how many have it.
        same_sets: of all routers' choices, those that hold the same factors as in training.
        kept: of the factors chosen in training, those chosen in the chat too.
        others: the same, against the choice in training of another conversation: what two questions share anyway.
        right_as_trained, right_in_chat: answers of which every token is the likeliest, by either choice.
        same_answers: answers whose likeliest tokens are the same by both.
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
    """The runs of supervised positions in `labels` [positions], one an answer."""
    supervised = torch.nn.functional.pad((labels != IGNORED).int(), (1, 1))
    change = supervised.diff()
    starts, ends = (change == 1).nonzero().flatten().tolist(), (change == -1).nonzero().flatten().tolist()
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def rows_of(labels: Tensor) -> Tensor:
    """Labels [1 + turns, positions] of the same tokens: all answers supervised, as in training; then each one alone."""
    rows = [labels]
    for answer in answers_in(labels):
        alone = torch.full_like(labels, IGNORED)
        alone[answer] = labels[answer]
        rows.append(alone)
    return torch.stack(rows)


@contextmanager
def choices(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the last pass's choices by router: bool [rows, E], True for a chosen factor."""
    chosen: dict[str, Tensor] = {}

    def note(module: RoutedLinear, args: tuple[Tensor, Tensor, Pass], output: Tensor, path: str) -> None:
        kept = args[2].kept[module]
        for side, factors in (("a", kept.a), ("b", kept.b)):
            none = torch.zeros(len(factors), module.mode.factors, dtype=torch.bool, device=factors.device)
            chosen[f"{path}.{side}"] = none.scatter(1, factors, True)

    handles = [
        module.register_forward_hook(lambda module, args, output, path=path: note(module, args, output, path))
        for path, module in modules.items()
    ]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def look(model: Any, ids: Tensor, labels: Tensor, pixels: Tensor) -> tuple[Tensor, list[list[list[int]]]]:
    """One conversation: the choices by every row of `rows_of`, bool [rows, routers, E], and what each row would say.

    Args:
        ids, labels: [positions], as upstream's preprocessing gives them, with one image.
        pixels: [1, channels, height, width].

    Returns:
        The second: for every row, the likeliest tokens of every answer.
    """
    rows = rows_of(labels)
    same = [len(rows), *[-1] * ids.dim()]
    with choices(required(model).modules) as chosen:
        logits = model(input_ids=ids.expand(same), labels=rows, images=pixels.expand(len(rows), -1, -1, -1)).logits
    # Behind the image, everything has moved by its features; the token before a position says what comes there.
    moved = logits.shape[1] - len(ids) - 1
    likeliest = logits.argmax(-1)
    answers = answers_in(labels)
    said = [[row[answer.start + moved : answer.stop + moved].tolist() for answer in answers] for row in likeliest]
    return torch.stack(list(chosen.values()), 1), said


def summary(found: Sequence[tuple[Tensor, Tensor, list[list[list[int]]]]]) -> list[Turn]:
    """Figures by turn.

    Args:
        found: for every conversation its labels, and what `look` gave.
    """
    sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(7, dtype=torch.float64))
    for place, (labels, chosen, said) in enumerate(found):
        other = found[place - 1][1][0]
        trained, rank = chosen[0], chosen[0].sum(-1)
        for turn, answer in enumerate(answers_in(labels)):
            chat, expected = chosen[turn + 1], labels[answer].tolist()
            as_trained, in_chat = said[0][turn], said[turn + 1][turn]
            figures = (
                (trained == chat).all(-1).double().mean(),
                ((trained & chat).sum(-1) / rank).mean(),
                ((other & chat).sum(-1) / rank).mean(),
                as_trained == expected,
                in_chat == expected,
                as_trained == in_chat,
            )
            sums[turn] += torch.tensor([1.0, *map(float, figures)], dtype=torch.float64)
    return [Turn(turn + 1, int(total[0]), *(total[1:] / total[0]).tolist()) for turn, total in sorted(sums.items())]


def conversations(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` conversations of several turns about one image, the same for the same seed."""
    read = json.loads(data.read_text(encoding="utf-8"))
    several = [sample for sample in read if "image" in sample and len(sample["conversations"]) > 2]
    return random.Random(seed).sample(several, min(count, len(several)))


def main(
    adapter: Annotated[Path, typer.Argument(help="A MixLoRA adapter.")],
    data: Annotated[Path, typer.Option(help="Conversations in LLaVA's training format.")],
    pictures: Annotated[Path, typer.Option(help="The folder that the data's images are in.")],
    template: Annotated[str, typer.Option(help="LLaVA's --version in training.")] = "v1",
    count: Annotated[int, typer.Option(min=2, help="How many conversations to take.")] = 300,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare the factors chosen in training with those chosen in a chat, turn by turn."""
    from llava import conversation
    from llava.mm_utils import get_model_name_from_path, process_images
    from llava.model.builder import load_pretrained_model
    from llava.train.train import DataArguments, preprocess, preprocess_multimodal

    name = get_model_name_from_path(str(adapter))
    tokenizer, model, processor, _ = load_pretrained_model(str(adapter), None, name, device="cpu")
    # The loader gives half precision, which is slow on a processor.
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
    Console(width=None if sys.stdout.isatty() else 160).print(_table(turns, f"{adapter}: {mode.settings()}"))
    if json_file is not None:
        content = {"settings": mode.settings(), "turns": [asdict(turn) for turn in turns]}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _table(turns: Sequence[Turn], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    headings = ("turn", "conversations", "same sets", "factors kept", "of another's", "right as trained", "in a chat")
    for heading in (*headings, "same answers"):
        table.add_column(heading, justify="right")
    for turn in turns:
        number, conversations, *shares = asdict(turn).values()
        table.add_row(str(number), str(conversations), *(f"{share:.1%}" for share in shares))
    return table


if __name__ == "__main__":
    typer.run(main)
