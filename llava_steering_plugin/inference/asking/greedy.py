"""Answers single questions greedily with a model that carries an adapter of its own, as `tunable.py` loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_steering_plugin.inference.asking.prompts import write_prompt
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.images import image_arguments, read_image
from llava_steering_plugin.inference.tunable import TunableModel


def pixels_of(opened: TunableModel, files: Sequence[Path]) -> dict[str, Any]:
    """Return the arguments of `forward` and `generate` that pass pictures, in the precision of the vision tower.

    Raises:
        ArgumentsError: a file cannot be read.
    """
    given = image_arguments([read_image(file) for file in files], opened.processor, opened.model)
    dtype, images = opened.model.get_vision_tower().dtype, given["images"]
    given["images"] = [each.to(dtype) for each in images] if isinstance(images, list) else images.to(dtype)
    return given


def answer_greedily(
    opened: TunableModel, question: Question, template: str, pixels: dict[str, Any], max_new_tokens: int
) -> list[int]:
    """Return the token ids that a model answers a question with, up to their end.

    Args:
        template: the name of one of LLaVA's conversation templates.
        pixels: the question's pictures, as `pixels_of` returns it.
    """
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token

    tokenizer, model = opened.tokenizer, opened.model
    prompt = write_prompt(question, template, model.config)
    ids = torch.tensor([tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX)], device=model.device)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            **pixels,
        )
    return until_end(output[0].tolist(), tokenizer)


def until_end(answer: list[int], tokenizer: Any) -> list[int]:
    """Return generated ids up to their end, without what comes before the answer."""
    if answer[:1] == [tokenizer.bos_token_id]:  # some versions of transformers put it before what is generated
        answer = answer[1:]
    end = tokenizer.eos_token_id
    return answer[: answer.index(end) + 1] if end in answer else answer
