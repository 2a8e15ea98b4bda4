"""Compares a model with what it was exported to: logits on a picture, and the tokens of prompts."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from PIL import Image
from torch import Tensor

from llava_steering_plugin.components.picture_layouts import ASPECT
from llava_steering_plugin.errors import AdapterError, ArgumentsError, UpstreamError
from llava_steering_plugin.export.layouts import Source
from llava_steering_plugin.inference.images import read_image

# Of the largest logit, in float32.
TOLERANCE = 1e-5
QUESTION = "What is in this picture?"
# One turn, and several: messages without the mark for the image, which stands in front of the first.
DIALOGUES: Mapping[str, Sequence[str]] = {
    "one turn": (QUESTION,),
    "several turns": (QUESTION, "A cheetah, it seems.", "And what is around it?"),
}


@dataclass(frozen=True)
class Answered:
    """Holds what a model made of a picture and a question.

    Attributes:
        pixels: of the picture as its tower gets it, float32 [1, 3, side, side], or [1, tiles, 3, side, side].
        logits: float32 [tokens, vocabulary].
    """

    pixels: Tensor
    logits: Tensor


def picture(path: Path | None) -> tuple[Image.Image, str]:
    """Return the picture on which models are compared, and what it is.

    Args:
        path: of a file; None: a photograph that gradio brings, which LLaVA needs.

    Raises:
        SteeringError: it cannot be read.
    """
    if path is None:
        found = find_spec("gradio")
        for folder in (found.submodule_search_locations or []) if found else []:
            path = next(iter(sorted(Path(folder).glob("test_data/*.jpg"))), None)
    if path is None:
        raise UpstreamError("gradio's photographs are not there. Give a picture with --image.")
    return read_image(path), path.name


def fitting(image: Image.Image, name: str, source: Source, *, own: bool) -> Image.Image:
    """Return a picture that the vision tower can take: some towers' processors do not scale, and take one size alone.

    Args:
        own: the picture is the user's, which is left as it is.

    Raises:
        ArgumentsError: the user's picture is of another size.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig

    if source.tiles:  # its processor scales
        return image
    folder, config = source.tower or source.folder, dict(source.config)
    try:
        vision = LlavaConfig.from_dict(config).vision_config if not source.tower else None
        side = (vision or CLIPVisionConfig.from_pretrained(folder)).image_size
        processor = CLIPImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError):  # which the plan of the export names
        return image
    pads = config.get(ASPECT) == "pad" or getattr(processor, "do_pad", False)
    settings = SimpleNamespace(image_aspect_ratio="pad" if pads else None)

    def made(of: Image.Image) -> tuple[int, ...]:
        return tuple(process_images([of], processor, settings).shape[-2:])

    if made(image) == (side, side):
        return image
    if not own and made(scaled := image.resize((side, side))) == (side, side):
        return scaled
    height, width = made(image)
    raise ArgumentsError(
        f"the vision tower takes pictures of {side} x {side} pixels, and its preprocessor_config.json makes "
        f"{width} x {height} of {name}. "
        + ("Give a picture of the tower's size with --image, or none." if own else "LLaVA fails there: mend that file.")
    )


def lacks_tiles() -> str:
    """Return why this transformers has no class for pictures in tiles; "" if it has one."""
    import transformers

    if hasattr(transformers, "LlavaNextForConditionalGeneration"):
        return ""
    return (
        f"transformers {transformers.__version__}, with which LLaVA runs here, has no LlavaNext. Export where LLaVA "
        "runs with 4.39 or newer to compare logits"
    )


def llavas_answer(
    folder: Path, tower: Path, images: Sequence[Image.Image], prompt: str, tokenizer: Any
) -> list[Answered]:
    """Return what the LLaVA in `folder` makes of a prompt and each of some pictures, in float32.

    Args:
        tower: folder of its vision tower, wherever its config says that it will be.
    """
    config = LlavaLlamaForCausalLM.config_class.from_pretrained(folder)
    config.mm_vision_tower = str(tower)
    model = LlavaLlamaForCausalLM.from_pretrained(
        folder, config=config, torch_dtype=torch.float32, low_cpu_mem_usage=True, attn_implementation="eager"
    ).eval()
    seeing = model.get_vision_tower()
    if not seeing.is_loaded:
        seeing.load_model()
    seeing.float()
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    found = []
    for image in images:
        pixels = process_images([image], seeing.image_processor, config)
        with torch.inference_mode():
            logits = model(input_ids=ids, images=pixels.float(), image_sizes=[image.size], use_cache=False).logits[0]
        found.append(Answered(pixels, logits))
    del model, seeing
    gc.collect()
    return found


def transformers_answer(
    folder: Path, images: Sequence[Image.Image], prompt: str, *, tiles: bool = False
) -> list[Answered]:
    """Return what transformers' Llava or LlavaNext in `folder` makes of a prompt and each of some pictures, in float32.

    Llava's processor is put together of its parts: the one of transformers 4.37 does not read what newer ones need.

    Args:
        tiles: it is a LlavaNext.
    """
    import transformers
    from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    if tiles:
        processor = AutoProcessor.from_pretrained(folder)
    else:
        processor = LlavaProcessor(CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    kind = getattr(transformers, f"Llava{'Next' if tiles else ''}ForConditionalGeneration")
    model = kind.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=True, attn_implementation="eager"
    ).eval()
    found = []
    for image in images:
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits[0]
        found.append(Answered(inputs["pixel_values"], logits))
    del model
    gc.collect()
    return found


def compare_answers(llavas: Answered, other: Answered) -> float:
    """Return the largest difference of logits, as a part of the largest logit. Only rows that both have are compared.

    Raises:
        AdapterError: it is too large, or the vision towers got other pixels.
    """
    if not torch.equal(llavas.pixels.float(), other.pixels.float()):
        raise AdapterError("the image processor of the new model gives other pixels than the old one's, so it is wrong")
    rows = min(llavas.logits.shape[-1], other.logits.shape[-1])
    one, two = llavas.logits[:, :rows], other.logits[:, :rows]
    if one.shape != two.shape:
        raise AdapterError(f"the new model makes {two.shape[0]} tokens of the prompt, the old one {one.shape[0]}")
    difference = float((one - two).abs().max() / one.abs().max())
    if not difference <= TOLERANCE:
        raise AdapterError(
            f"the logits of both models differ by {difference:.1e} of the largest one; {TOLERANCE:.0e} may be rounding"
        )
    return difference


def prompt_of(conversation: Any, dialogue: Sequence[str], image: str) -> str:
    """Return the prompt that LLaVA writes for a dialogue whose first message is about an image."""
    written = conversation.copy()
    for number, text in enumerate(dialogue):
        written.append_message(written.roles[number % 2], f"{image}\n{text}" if number == 0 else text)
    written.append_message(written.roles[1], None)
    return str(written.get_prompt())


def messages_of(dialogue: Sequence[str]) -> list[dict[str, Any]]:
    """Return a dialogue as messages of a chat template; an image belongs to the first."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[number % 2], "content": [{"type": "text", "text": text}]} for number, text in enumerate(dialogue)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def first_other_token(prompt: str, llavas: Any, rendered: str, other: Any, image_token: int) -> str | None:
    """Compare the tokens of LLaVA's prompt with those of the chat template's; return the first difference, if any.

    Args:
        prompt: LLaVA's.
        llavas: its tokenizer.
        rendered: what the chat template makes.
        other: the tokenizer of transformers' model.
        image_token: id of "<image>" there.
    """
    one = tokenizer_image_token(prompt, llavas, IMAGE_TOKEN_INDEX)
    two = [IMAGE_TOKEN_INDEX if token == image_token else token for token in other(rendered).input_ids]
    if one == two:
        return None
    place = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    there, here = (
        " ".join(_word(tokenizer, token) for token in ids[place : place + 2])
        for tokenizer, ids in ((llavas, one), (other, two))
    )
    return f"from token {place} on it is {here!r}, and {there!r} in LLaVA"


def _word(tokenizer: Any, token: int) -> str:
    return "<image>" if token == IMAGE_TOKEN_INDEX else str(tokenizer.convert_ids_to_tokens(token))
