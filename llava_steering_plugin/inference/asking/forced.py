"""Write a question with a given answer as one sequence, as a model reads it in training, and tell its parts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ForcedAnswer:
    """Token ids of a prompt and its answer.

    Attributes:
        ids: with LLaVA's placeholder where an image goes.
        first: whether the first id is the beginning-of-sequence token.
        system: the range of ids that come from the system prompt.
        answer: where the answer begins.
    """

    ids: list[int]
    first: bool
    system: range
    answer: int


def force_answer(tokenizer: Any, template: str, text: str, answer: str | Sequence[int]) -> ForcedAnswer:
    """Write a question and its answer in a conversation template.

    Args:
        template: the name of one of LLaVA's conversation templates.
        text: what the user says, with LLaVA's mark where an image goes.
        answer: its text, or the token ids that a model generated.
    """
    prompt = _ids(tokenizer, _written(template, text, None))
    if isinstance(answer, str):
        ids = _ids(tokenizer, _written(template, text, answer))
        begin = _common(prompt, ids)
    else:
        ids, begin = [*prompt, *answer], len(prompt)
    if len(ids) > begin + 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    without = _ids(tokenizer, _written(template, text, None, system=""))
    start = _common(prompt, without)
    end = len(prompt) - _common(prompt[start:][::-1], without[start:][::-1])
    first = bool(ids) and ids[0] == tokenizer.bos_token_id
    return ForcedAnswer(ids, first, range(max(start, int(first)), end), begin)


def _written(template: str, text: str, answer: str | None, system: str | None = None) -> str:
    """Return a conversation of one question in LLaVA's template, with another system prompt if one is given."""
    from llava.conversation import conv_templates

    conversation = conv_templates[template].copy()
    if system is not None:
        conversation.system = system
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], answer)
    return str(conversation.get_prompt())


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token

    return list(tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest beginning that two sequences share."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
