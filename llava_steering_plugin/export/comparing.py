"""Compares a model that was exported with what it was made of: the tokens of prompts, and logits about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.export.configs import TOWER_FOLDER
from llava_steering_plugin.export.layouts import Layout, Source
from llava_steering_plugin.export.plans import Plan
from llava_steering_plugin.export.vocabulary import IMAGE, llavas_tokenizer
from llava_steering_plugin.foreign_files import read_json
from llava_steering_plugin.upstream.text.conversations import marked_as


def template_of(name: str) -> Any:
    """Return one of LLaVA's conversation templates."""
    from llava.conversation import conv_templates

    return conv_templates[name]


def mark_of(source: Source) -> str:
    """Return how the prompts of a LLaVA mark an image."""

    class Settings:
        mm_use_im_start_end = source.config.get("mm_use_im_start_end", False)

    return marked_as(IMAGE, Settings)


def compare_prompts(source: Source, staged: Path, conversation: str, checks: list[str]) -> list[str]:
    """Compare the tokens of prompts in both layouts; return what differs.

    Raises:
        AdapterError: those of one question about an image differ after an export to transformers.
    """
    from transformers import AutoTokenizer

    from llava_steering_plugin.export.verification import DIALOGUES, first_other_token, messages_of, prompt_of

    forward = source.layout is Layout.LLAVA
    llava, other = (source.folder, staged) if forward else (staged, source.folder)
    slow, fast = llavas_tokenizer(llava), AutoTokenizer.from_pretrained(other)
    notes = []
    for name, dialogue in DIALOGUES.items():
        prompt = prompt_of(template_of(conversation), dialogue, mark_of(source) if forward else IMAGE)
        # transformers' model may bring another template than LLaVA's: the tokens alone are compared there.
        rendered = prompt
        if forward:
            rendered = fast.apply_chat_template(messages_of(dialogue), tokenize=False, add_generation_prompt=True)
        image_token = fast.convert_tokens_to_ids(IMAGE)
        difference = first_other_token(prompt, slow, rendered, fast, image_token)
        if difference is None:
            checks.append(f"the prompt of {name} ({conversation}) has the tokens of LLaVA's, one by one")
        elif forward and name == "one turn":
            raise AdapterError(f"the chat template does not write LLaVA's prompt of {conversation}: {difference}")
        else:
            notes.append(f"the prompt of {name} differs from LLaVA's: {difference}")
    return notes


def compare_logits(
    source: Source,
    staged: Path,
    conversation: str,
    plan: Plan,
    picture: Any,
    memory: int | None,
    checks: list[str],
    notes: list[str],
) -> None:
    """Compare what both models make of a picture, where they fit into memory, and say so in `checks` or `notes`.

    Args:
        picture: an image and its name; None: compare none.
        memory: bytes that a model may take; None: those that are free.

    Raises:
        AdapterError: logits differ.
    """
    if picture is None:
        notes.append("no logits were compared, as asked")
        return
    import psutil

    values = sum(_count(each.shape) for pieces in plan.pieces.values() for each in pieces)
    free = psutil.virtual_memory().available if memory is None else memory
    if (needed := int(4 * values * 1.2)) > free:
        notes.append(
            f"no logits were compared: a model in float32 takes {needed:,} bytes of memory, and {free:,} are free. "
            "The tensors were"
        )
        return
    from llava_steering_plugin.export import verification
    from llava_steering_plugin.export.verification import QUESTION, prompt_of

    if source.tiles and (missing := verification.lacks_tiles()):
        notes.append(f"no logits were compared: {missing}. The tensors were")
        return
    image, name = picture
    forward = source.layout is Layout.LLAVA
    llava, other = (source.folder, staged) if forward else (staged, source.folder)
    tower = source.tower if source.tower is not None else staged / TOWER_FOLDER
    prompt = prompt_of(template_of(conversation), (QUESTION,), mark_of(source) if forward else IMAGE)
    images = _parts(image) if source.tiles else [image]
    first = verification.llavas_answer(llava, tower, images, prompt, llavas_tokenizer(llava))
    config = read_json(llava / "config.json")
    squared = [_squared(each, other, config.get("image_aspect_ratio") == "pad") for each in images]
    second = verification.transformers_answer(other, squared, prompt, tiles=source.tiles)
    differences = [verification.compare_answers(*pair) for pair in zip(first, second, strict=True)]
    lengths = ", ".join(str(each.logits.shape[0]) for each in first)
    name += ", a wide and a high part of it" if source.tiles else ""
    checks.append(
        f"logits of {lengths} tokens about {name}, in float32: they differ by at most {max(differences):.1e} of the "
        "largest one"
    )


def _parts(image: Any) -> list[Any]:
    """Return a picture and parts of it of other shapes: into which tiles a picture is cut depends on its shape."""
    width, height = image.size
    sizes = ((width, max(2, height * 2 // 5)), (max(2, width // 3), height))
    return [image, *(image.crop((0, 0, *size)) for size in sizes)]


def _squared(image: Any, folder: Path, pads: bool) -> Any:
    """Return the picture as a model that does not pad by itself is to get it."""
    if not pads:
        return image
    from PIL import Image
    from transformers import CLIPImageProcessor

    mean = CLIPImageProcessor.from_pretrained(folder).image_mean
    side = max(image.size)
    square = Image.new(image.mode, (side, side), tuple(int(part * 255) for part in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _count(shape: Sequence[int]) -> int:
    product = 1
    for each in shape:
        product *= each
    return product
