"""Groups the tokens of a text into its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Word:
    """One word of a text, as blanks separate them.

    Attributes:
        tokens: the numbers of its tokens among those of the text.
    """

    text: str
    tokens: tuple[int, ...]


def group_words(tokenizer: Any, ids: Sequence[int]) -> list[Word]:
    """Return the words that token ids spell; tokens that spell nothing belong to the word before them.

    Whatever the tokenizer: the text that the first tokens spell tells in which word the next one is.
    """
    words = _spelled(tokenizer, ids).split()
    tokens: list[list[int]] = [[] for _ in words]
    for number in range(len(ids)):
        before, now = (_spelled(tokenizer, ids[:end]) for end in (number, number + 1))
        # A letter behind it shows whether a blank at the end has begun the next word.
        place = len(f"{now}x".split()) if now != before else len(before.split())
        if words:
            tokens[min(max(place, 1), len(words)) - 1].append(number)
    return [Word(text, tuple(own)) for text, own in zip(words, tokens, strict=True) if own]


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
