"""Exports a model from the one layout to the other: checked, written beside its place, compared, put there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.components import vllm_template
from llava_steering_plugin.components.chat_template import chat_template
from llava_steering_plugin.errors import AdapterError, ArgumentsError, Problems, UpstreamError
from llava_steering_plugin.export.configs import TOWER_FOLDER
from llava_steering_plugin.export.layouts import Layout, Source, recognise
from llava_steering_plugin.export.plans import Plan, plan_for_llava, plan_for_transformers, read_record, write_files
from llava_steering_plugin.export.streaming import SHARD_BYTES, Progress, compare_pieces, write_pieces
from llava_steering_plugin.export.vocabulary import IMAGE, llavas_tokenizer, with_image_token, without_image_token
from llava_steering_plugin.foreign_files import read_json
from llava_steering_plugin.upstream.text.conversations import checked_template, marked_as, template_by_name
from llava_steering_plugin.whole_files import flush, remove_partials

_SPARE = 64 * 2**20  # for tokenizers, configs and the index


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        folder: the new model.
        layout: that it has now.
        conversation: name of LLaVA's template.
        checks: what was verified.
        notes: what the user should know.
    """

    folder: Path
    layout: Layout
    conversation: str
    checks: tuple[str, ...]
    notes: tuple[str, ...]


def _silent(what: str, done: int, total: int) -> None:
    pass


def export(
    base: str,
    target: str | os.PathLike[str],
    *,
    conversation: str | None = None,
    image: Path | None = None,
    logits: bool = True,
    progress: Progress = _silent,
    shard: int = SHARD_BYTES,
    memory: int | None = None,
) -> Export:
    """Write the model `base`, a LLaVA or a LlavaForConditionalGeneration, as the other one into `target`.

    Args:
        base: folder or hub id.
        target: new or empty folder.
        conversation: LLaVA's template for its prompts; None: the one that LLaVA's chat takes for a model of its name.
        image: picture on which both are compared; None: a photograph that LLaVA's dependencies bring.
        logits: compare logits, where the models fit into memory.
        progress: is told what has been done.
        shard: bytes of a file of weights, at most.
        memory: bytes that a model may take for logits; None: those that are free.

    Raises:
        SteeringError: something is wrong with the model or the target, or the result differs. Nothing is left then.
    """
    path = Path(target).expanduser().absolute()
    problems = Problems()
    source: Source | None = None
    with problems.noted():
        _check_target(path)
    with problems.noted():
        source = recognise(base)
    with problems.noted():
        named = _checked_template(conversation, Path(base).name, source)
    problems.raise_any("this cannot be exported")
    assert source is not None
    picture: Any = None
    if logits:
        from llava_steering_plugin.export.verification import picture as found

        picture = found(image)
    staged = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path.parent, [path.name])
        staged.mkdir()
        plan, checks = _written(source, path, staged, named, progress, shard)
        notes = [*plan.notes, *_compare_prompts(source, staged, named, checks)]
        _compare_logits(source, staged, named, plan, picture, memory, checks, notes)
        for file in staged.rglob("*"):
            flush(file)
        os.replace(staged, path)
        flush(path.parent)
    except OSError as error:
        raise AdapterError(f"the model could not be written to {path}: {error}. Choose another folder.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    made = Layout.TRANSFORMERS if source.layout is Layout.LLAVA else Layout.LLAVA
    return Export(path, made, named, tuple(checks), tuple(notes))


def _check_target(target: Path) -> None:
    try:
        if target.exists() and not target.is_dir():
            raise ArgumentsError(f"{target} is a file. Give a new folder.")
        if target.exists() and any(target.iterdir()):
            raise ArgumentsError(f"{target} is not empty. Give a new folder.")
    except OSError as error:
        raise ArgumentsError(f"{target} cannot be looked into: {error}. Give a new folder.") from error


def _checked_template(named: str | None, model: str, source: Source | None) -> str:
    if named is None and source is not None and source.layout is Layout.TRANSFORMERS:
        recorded = read_record(source.folder).get("conversation", {}).get("name")
        named = recorded if isinstance(recorded, str) else None
    try:
        name = checked_template(named or template_by_name(model))
        chat_template(_conversation(name))
    except ImportError as error:
        raise UpstreamError(
            f"LLaVA cannot be imported ({error}). Export where it is installed; the result needs transformers alone."
        ) from error
    return name


def _conversation(name: str) -> Any:
    from llava.conversation import conv_templates

    return conv_templates[name]


def _written(
    source: Source, target: Path, staged: Path, conversation: str, progress: Progress, shard: int
) -> tuple[Plan, list[str]]:
    """Write everything into `staged`, and compare the tensors."""
    if source.layout is Layout.LLAVA:
        llavas_tokenizer(source.folder)
        template = chat_template(_conversation(conversation), _mark(source))
        vocabulary = with_image_token(source.folder, staged, template)
        plan = plan_for_transformers(source, vocabulary, template, conversation)
        (staged / "chat_template.jinja").write_text(template, encoding="utf-8")
        (staged / vllm_template.FILE).write_text(vllm_template.with_bos(template), encoding="utf-8")
    else:
        record = read_record(source.folder)
        tokens = without_image_token(source.folder, staged, record)
        plan = plan_for_llava(source, target, tokens, record)
    _check_disk(target.parent, plan.size)
    write_files(staged, plan.files)
    for folder, pieces in plan.pieces.items():
        write_pieces(staged / folder, pieces, progress, shard, f"writing {folder}".strip())
    compared = sum(
        compare_pieces(staged / folder, pieces, progress, f"comparing {folder}".strip())
        for folder, pieces in plan.pieces.items()
    )
    return plan, [f"{compared} tensors, read back, are equal to what they were made of, bit by bit"]


def _check_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE:
        raise ArgumentsError(
            f"the model takes {size + _SPARE:,} bytes, and the disk of {folder} has {free:,} free. Choose another disk."
        )


def _mark(source: Source) -> str:
    """Return how the prompts of a LLaVA mark an image."""

    class Settings:
        mm_use_im_start_end = source.config.get("mm_use_im_start_end", False)

    return marked_as(IMAGE, Settings)


def _compare_prompts(source: Source, staged: Path, conversation: str, checks: list[str]) -> list[str]:
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
        prompt = prompt_of(_conversation(conversation), dialogue, _mark(source) if forward else IMAGE)
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


def _compare_logits(
    source: Source,
    staged: Path,
    conversation: str,
    plan: Plan,
    picture: Any,
    memory: int | None,
    checks: list[str],
    notes: list[str],
) -> None:
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
    from llava_steering_plugin.export.verification import (
        QUESTION,
        compare_answers,
        llavas_answer,
        prompt_of,
        transformers_answer,
    )

    image, name = picture
    forward = source.layout is Layout.LLAVA
    llava, other = (source.folder, staged) if forward else (staged, source.folder)
    tower = source.tower if source.tower is not None else staged / TOWER_FOLDER
    prompt = prompt_of(_conversation(conversation), (QUESTION,), _mark(source) if forward else IMAGE)
    first = llavas_answer(llava, tower, image, prompt, llavas_tokenizer(llava))
    config = read_json(llava / "config.json")
    squared = _squared(image, other, config.get("image_aspect_ratio") == "pad")
    difference = compare_answers(first, transformers_answer(other, squared, prompt))
    checks.append(
        f"logits of {first.logits.shape[0]} tokens about {name}, in float32: they differ by at most {difference:.1e} "
        "of the largest one"
    )


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
