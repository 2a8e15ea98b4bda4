"""Read the samples of a data file one by one: LLaVA's trainer holds all of them, a check need not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.training.data.source import NO_SAMPLES, no_list, reading

BLOCK = 1 << 20
# JSON that ends too early is an error here or further ahead: a number, an escape or a word can be cut in the middle.
_CUT = 16


def samples_in(path: str) -> Iterator[tuple[Any, int]]:
    """Yield the samples of a data file, each with the number of bytes that have been read by then.

    Raises:
        DataError: the file is missing, is no JSON, or holds no list of samples; what comes before is yielded.
    """
    # In the encoding of the locale, as LLaVA opens it.
    with reading(path), open(path) as file:
        text = _Text(file)
        if text.next() != "[":
            raise DataError(_something_else(text, path))
        text.at += 1
        if text.next() == "]":
            raise DataError(NO_SAMPLES.format(path))
        while True:
            yield text.value(), text.bytes_read
            mark = text.next()
            text.at += 1
            if mark == "]":
                break
            if mark != ",":
                raise text.error("Expecting ',' delimiter", text.at - 1)
        if text.next():
            raise text.error("Extra data", text.at)


def _something_else(text: _Text, path: str) -> str:
    if text.text.startswith("\ufeff"):
        return f"the training data in {path} is no JSON: it begins with a byte order mark; save it without."
    found = text.value()
    if text.next():
        raise text.error("Extra data", text.at)
    return no_list(path, found)


class _Text:
    """Holds the part of a file that is being decoded.

    Attributes:
        text: what has been read and is not decoded yet, and what comes before it.
        at: where in `text` the next value begins.
    """

    def __init__(self, file: TextIO):
        self.file, self.text, self.at = file, "", 0
        self.ended, self.bytes_read = False, 0
        self.lines, self.column = 0, 0  # of what has been dropped: line ends, and characters since the last one

    def next(self) -> str:
        """Return the next character that is no white space, without going past it; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\n\r":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self._read_on()

    def value(self) -> Any:
        """Decode the next value."""
        self.next()
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _CUT
                if self.ended or not unfinished:
                    raise self.error(error.msg, error.pos) from None
            else:
                # A number may go on: of 1.5e-3, the parts "1", "1." and "1.5e" would be read as 1 and 1.5.
                if self.ended or self.text[end : end + _CUT].strip("0123456789.eE+-"):
                    self.at = end
                    return found
            self._read_on()

    def error(self, message: str, position: int) -> json.JSONDecodeError:
        """Return the error at a position of `text`, with line and column in the file."""
        error = json.JSONDecodeError(message, self.text, position)
        column = error.colno + (self.column if error.lineno == 1 else 0)
        error.args = (f"{message}: line {self.lines + error.lineno} column {column}",)
        return error

    def _read_on(self) -> None:
        dropped, rest = self.text[: self.at], self.text[self.at :]
        ends = dropped.count("\n")
        self.lines += ends
        self.column = len(dropped) - dropped.rfind("\n") - 1 if ends else self.column + len(dropped)
        more = self.file.read(max(BLOCK, len(rest)))  # as much again: a long value is not decoded too often
        self.text, self.at, self.ended = rest + more, 0, not more
        self.bytes_read += len(more.encode(self.file.encoding, "surrogatepass"))


_DECODER = json.JSONDecoder()
