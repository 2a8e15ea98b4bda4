"""Answers many questions in one process, in batches, and writes down which factors MixLoRA chose for each.

Upstream's evaluation script asks one at a time and leaves no way to look inside; this loads with upstream's
`load_pretrained_model`, makes the same prompts and writes the same answers file.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from llava_steering_plugin.adapters.attachment import attachment_of
from llava_steering_plugin.modes.base import Pass
from llava_steering_plugin.modes.mixlora import RoutedLinear

NEW_TOKENS = 4


def main(
    model: Annotated[Path, typer.Option()],
    questions: Annotated[Path, typer.Option(help="As upstream's scripts read them.")],
    pictures: Annotated[Path, typer.Option()],
    answers: Annotated[Path, typer.Option(help="Written as upstream's scripts do.")],
    base: Annotated[Path | None, typer.Option(help="For LoRA.")] = None,
    routing: Annotated[Path | None, typer.Option(help="Where the chosen factors go, with MixLoRA.")] = None,
    batch: Annotated[int, typer.Option()] = 32,
) -> None:
    """Answer a file of questions with a model or an adapter."""
    tokenizer, llava, processor, _ = load_pretrained_model(
        str(model), str(base) if base else None, get_model_name_from_path(str(model)), device="cpu"
    )
    # The loader gives half precision, which is slow on a processor.
    llava = llava.float().eval()
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    said: dict[int, str] = {}
    with choices(llava) as chosen, torch.inference_mode():
        order: list[int] = []
        for places, ids in tqdm(list(batches(lines, tokenizer, batch))):
            images = [Image.open(pictures / lines[place]["image"]).convert("RGB") for place in places]
            output = llava.generate(
                ids,
                images=process_images(images, processor, llava.config).float(),
                image_sizes=[image.size for image in images],
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                use_cache=True,
            )
            said.update(zip(places, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True))
            order += places
    with answers.open("w") as file:
        for place, line in enumerate(lines):
            file.write(json.dumps({"question_id": line["question_id"], "text": said[place].strip()}) + "\n")
    if routing is not None:
        back = np.argsort(order)
        np.savez_compressed(routing, **{name: torch.cat(parts).numpy()[back] for name, parts in chosen.items()})


def batches(lines: list[dict[str, Any]], tokenizer: Any, size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Places and ids [rows, positions] of prompts of equal length: nothing is padded."""
    by_length: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, line in enumerate(lines):
        conversation = conv_templates["v1"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{line['text']}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        by_length[len(ids)].append((place, ids))
    for alike in by_length.values():
        for start in range(0, len(alike), size):
            places, ids = zip(*alike[start : start + size], strict=True)
            yield list(places), torch.stack(ids)


@contextmanager
def choices(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside the block, gathers what MixLoRA's routers choose in every prefill: int16 [rows, r], by linear and side.

    A choice is a function of what a linear gets, so the module is asked again for what it is about to choose.
    """
    chosen: dict[str, list[Tensor]] = defaultdict(list)
    attachment = attachment_of(model)
    handles = []

    def look(module: RoutedLinear, args: tuple[Tensor, Tensor, Pass], path: str) -> None:
        _, inputs, step = args
        if not step.decode:
            found = module.route(inputs.reshape(*step.prompt.shape, -1), step)
            for side, choice in (("a", found.a), ("b", found.b)):
                chosen[f"{path}.{side}"].append(choice.factors.to(torch.int16))

    for path, module in (attachment.modules if attachment else {}).items():
        if isinstance(module, RoutedLinear):
            handles.append(module.register_forward_pre_hook(lambda module, args, path=path: look(module, args, path)))
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    sys.exit(typer.run(main))
