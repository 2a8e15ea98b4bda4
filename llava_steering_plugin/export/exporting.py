"""Exports a model from the one layout to the other: checked, written beside its place, compared, put there."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.components import vllm_template
from llava_steering_plugin.components.chat_template import chat_template
from llava_steering_plugin.errors import AdapterError, ArgumentsError, Problems, UpstreamError
from llava_steering_plugin.export.comparing import compare_logits, compare_prompts, mark_of, template_of
from llava_steering_plugin.export.layouts import Layout, Source, recognise
from llava_steering_plugin.export.plans import (
    Plan,
    plan_for_llava,
    plan_for_transformers,
    processor,
    read_record,
    write_files,
)
from llava_steering_plugin.export.streaming import SHARD_BYTES, Progress, compare_pieces, write_pieces
from llava_steering_plugin.export.vocabulary import llavas_tokenizer, with_image_token, without_image_token
from llava_steering_plugin.upstream.text.conversations import checked_template, template_by_name
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
        from llava_steering_plugin.export import verification

        given, name = verification.picture(image)
        picture = verification.fitting(given, name, source, own=image is not None), name
    staged = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path.parent, [path.name])
        staged.mkdir()
        plan, checks = _written(source, path, staged, named, progress, shard)
        notes = [*plan.notes, *compare_prompts(source, staged, named, checks)]
        compare_logits(source, staged, named, plan, picture, memory, checks, notes)
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
        chat_template(template_of(name))
    except ImportError as error:
        raise UpstreamError(
            f"LLaVA cannot be imported ({error}). Export where it is installed; the result needs transformers alone."
        ) from error
    return name


def _written(
    source: Source, target: Path, staged: Path, conversation: str, progress: Progress, shard: int
) -> tuple[Plan, list[str]]:
    """Write everything into `staged`, and compare the tensors."""
    if source.layout is Layout.LLAVA:
        llavas_tokenizer(source.folder)
        template = chat_template(template_of(conversation), mark_of(source))
        vocabulary = with_image_token(source.folder, staged, template, processor(source))
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
