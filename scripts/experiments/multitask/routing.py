"""Record which factors MixLoRA chooses for each question: `python -m experiments.multitask.routing`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.shared.choices import choices
from llava_steering_plugin.adapters.attachment import required

BATCH = 32


def main(
    adapter: Annotated[Path, typer.Option(help="Folder of the MixLoRA adapter.")],
    questions: Annotated[Path, typer.Option(help="Questions in upstream's format.")],
    pictures: Annotated[Path, typer.Option(help="Folder of their images.")],
    output: Annotated[Path, typer.Option(help="File for the factors: int16 [questions, r] for each router.")],
) -> None:
    """Run the prefill of every question, in float32, and save the chosen factors."""
    from llava.mm_utils import get_model_name_from_path, process_images
    from llava.model.builder import load_pretrained_model
    from PIL import Image
    from tqdm import tqdm

    name = get_model_name_from_path(str(adapter))
    tokenizer, model, processor, _ = load_pretrained_model(str(adapter), None, name, device="cpu")
    # The loader returns half precision, which is slow on a CPU.
    model = model.float().eval()
    lines = [json.loads(line) for line in questions.read_text(encoding="utf-8").split("\n") if line]
    order: list[int] = []
    factors: dict[str, list[Tensor]] = defaultdict(list)
    with choices(required(model).modules) as chosen, torch.inference_mode():
        for places, ids in tqdm(list(batches(lines, tokenizer))):
            images = [Image.open(pictures / lines[place]["image"]).convert("RGB") for place in places]
            model.generate(
                ids,
                images=process_images(images, processor, model.config).float(),
                image_sizes=[image.size for image in images],
                do_sample=False,
                max_new_tokens=1,
                use_cache=True,
            )
            order += places
            for router, mask in chosen.items():
                factors[router].append(mask.nonzero()[:, 1].reshape(len(mask), -1))
    back = np.argsort(order)
    found = {router: torch.cat(parts).to(torch.int16).numpy()[back] for router, parts in factors.items()}
    np.savez_compressed(output, **found)


def batches(lines: list[dict[str, Any]], tokenizer: Any) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places and ids [rows, positions] of prompts of equal length, so that nothing is padded."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    by_length: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, line in enumerate(lines):
        conversation = conv_templates["v1"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{line['text']}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        by_length[len(ids)].append((place, ids))
    for alike in by_length.values():
        for start in range(0, len(alike), BATCH):
            places, ids = zip(*alike[start : start + BATCH], strict=True)
            yield list(places), torch.stack(ids)


if __name__ == "__main__":
    typer.run(main)
