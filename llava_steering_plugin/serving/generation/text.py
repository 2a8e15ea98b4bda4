"""Turns the tokens of one answer into pieces of text, and finds the stop texts.

A token may be part of a character, and several tokens one stop text. Whatever may still change, or may be the
beginning of a stop text, is held back until it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PARTIAL = "�"  # what tokenizers decode part of a character to


class AnswerText:
    """The text of one answer, token by token.

    Args:
        stops: texts before which it ends.
        special: token ids of those stop texts that are special tokens, which are in no text.

    Attributes:
        stopped: a stop text has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], special: Sequence[Sequence[int]] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._special = [list(ids) for ids in special]
        self._ids: list[int] = []
        # A tokenizer would make this set anew for every token.
        self._left_out = frozenset(tokenizer.all_special_ids)
        # Only the tokens from `_first` on are decoded again; those before `_next` have been passed on. The first word
        # of a text loses its space, so a few tokens before are decoded with every new one.
        self._first = self._next = 0
        self._before = ""
        self._held = ""

    def add(self, token: int) -> str:
        """Take the next token; return the text that is certain by now and was not before."""
        self._ids.append(token)
        decoded = self._decoded(self._first)
        if len(decoded) > len(self._before) and not decoded.endswith(PARTIAL):
            self._held += decoded[len(self._before) :]
            new = self._decoded(self._next)
            # Not at a lone space: sentencepiece drops all spaces at the beginning, also the next word's.
            one = len(self._ids) == self._next + 1
            if new.strip() and (one or self._decoded(self._next, self._next + 1).strip()):
                self._first, decoded = self._next, new
            self._next, self._before = len(self._ids), decoded
        return self._certain()

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        if not self.stopped:
            self._held += self._decoded(self._first)[len(self._before) :]
            self._cut()
        text, self._held = self._held, ""
        return text

    def _certain(self) -> str:
        self._cut()
        if self.stopped:
            return self.rest()
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _cut(self) -> None:
        """End the text before the first stop text."""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self._held = self._held[: min(places)]
        self.stopped = bool(places) or any(self._ids[-len(ids) :] == ids for ids in self._special)

    def _decoded(self, first: int, end: int | None = None) -> str:
        # Tokenizers may tidy spaces up, which would change what has been passed on.
        ids = [token for token in self._ids[first:end] if token not in self._left_out]
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def special_stops(tokenizer: Any, stops: Sequence[str]) -> list[list[int]]:
    """Return the token ids of those stop texts that hold special tokens."""
    special = set(tokenizer.all_special_ids)
    found = [tokenizer(stop, add_special_tokens=False).input_ids for stop in stops]
    return [ids for ids in found if special.intersection(ids)]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, but not all of it, with which `text` ends."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
