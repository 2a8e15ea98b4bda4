"""Finds the questions that are too long for a model, from the files of the model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.components.image_tokens import tower_shape
from llava_steering_plugin.components.picture_layouts import ASPECT, is_anyres
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.inference.asking.prompts import CONVERSATION, write_prompt
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import image_size
from llava_steering_plugin.upstream.model.language_models import loaded_as
from llava_steering_plugin.upstream.text.chat_templates import offer_if_any
from llava_steering_plugin.upstream.text.conversations import checked_template, template_of_base
from llava_steering_plugin.upstream.text.tokenizers import Tokenizers

NAMED = 20  # questions in a message


def check_lengths(
    questions: Sequence[Question],
    images: Path,
    base: str,
    described: Mapping[str, Any],
    templates: Mapping[str, str | None],
    max_new_tokens: int,
) -> list[str]:
    """Check that every prompt fits into the model's context, and return notes on answers that may run out of it.

    Args:
        images: the folder of the images.
        base: the model, folder or hub id.
        described: its config.json.
        templates: the conversation template of each adapter; None: LLaVA's default.

    Raises:
        ArgumentsError: some prompts are too long, of which LLaVA would cut the end off; the message names them.
    """
    config = SimpleNamespace(**described)
    tokens = PromptTokens(config, tower_shape(described, _read_tower))
    context = tokens.context
    too_long, notes = [], []
    for question, length in _lengths(questions, images, config, templates, tokens, _tokenizer(base, described)):
        most = context.prompt(bool(question.images))
        if most is not None and length > most:
            too_long.append(f"question {question.id!r}: {length:,} tokens; the model takes {most:,}")
        elif context.positions is not None and length + max_new_tokens > context.positions:
            notes.append(f"question {question.id!r}: {length:,} tokens and up to {max_new_tokens:,} of the answer")
    if too_long:
        raise ArgumentsError(
            listing(
                f"{len(too_long)} question(s) are longer than the model's context, so LLaVA would cut their end off "
                "or answer at random. Shorten them or remove them",
                _first(too_long),
            )
        )
    if notes:
        headline = (
            f"{len(notes)} answer(s) may go on beyond the {context.positions:,} tokens that the model was made for"
        )
        return [listing(f"{headline}; a smaller --max-new-tokens ends them before", _first(notes))]
    return []


def _read_tower(name: str) -> Mapping[str, Any]:
    """Return config.json of LLaVA's own vision tower; where it cannot be read, CLIP-L/336's, which LLaVA-1.5 has."""
    usual = {"image_size": 336, "patch_size": 14}
    try:
        described = read_config(name)
    except SteeringError:
        return usual
    return usual | dict(described.get("vision_config", described))


def _lengths(
    questions: Sequence[Question],
    images: Path,
    config: Any,
    templates: Mapping[str, str | None],
    tokens: PromptTokens,
    tokenizer: Any,
) -> Iterator[tuple[Question, int]]:
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token

    for question in questions:
        named = templates.get(question.adapter) or template_of_base(vars(config)) or CONVERSATION
        template = checked_template(named, question.adapter)
        ids = tokenizer_image_token(write_prompt(question, template, config), tokenizer, IMAGE_TOKEN_INDEX)
        yield question, tokens.count(ids, [_size(images / name, config) for name in question.images])


def _size(file: Path, config: Any) -> tuple[int, int]:
    """Return width and height of an image where its tokens depend on them."""
    if is_anyres(getattr(config, ASPECT, None)):
        with suppress(ArgumentsError):  # a damaged one is named when it is read, with its question
            return image_size(file)
    return 1, 1


def _tokenizer(base: str, described: Mapping[str, Any]) -> Any:
    """Return the tokenizer that LLaVA's loader takes for a base."""
    from transformers import AutoTokenizer

    model_type = str(described.get("model_type"))
    fast = any(name in model_type for name in ("mpt", "mistral"))
    component = loaded_as(model_type)
    loader = AutoTokenizer if component is None else Tokenizers(AutoTokenizer, component.name)
    try:
        tokenizer = loader.from_pretrained(base, use_fast=fast)
    except (OSError, ValueError, TypeError, LookupError, ImportError, RuntimeError) as error:
        raise SteeringError(f"the tokenizer of {base} cannot be loaded: {error}. Copy the model again.") from error
    offer_if_any(tokenizer, base)
    if described.get("mm_use_im_start_end"):
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN

        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return tokenizer


def _first(lines: Sequence[str]) -> list[str]:
    return [*lines[:NAMED], *([f"and {len(lines) - NAMED:,} more"] if len(lines) > NAMED else [])]
