"""Find out whether LLaVA can be trained on a sample: the one list of defects, for trainings and `check-data` alike.

A defect is what ends LLaVA's trainer, and what it misreads without a word: a picture of 3 pixels' height whose rows it
takes for colours, two `<image>` of which the second takes the picture of the next sample, a picture that no `<image>`
asks for. What it reads rightly is none, however odd: pictures of any mode, paths out of the folder, missing ids.

Nothing here imports torch or LLaVA.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.training.data.pictured import has_pictures, images_of, marks_wanted, missing_video, shown

IMAGE_MARK = "<image>"
HUMAN, ANSWERING = "human", "gpt"

# How LLaVA's `preprocess` reads turns, by the conversation template of a training.
ALTERNATING = "alternating"  # human and gpt by turns; a first turn that is not human's is left out
SINGLE = "single"  # in any order
PLAIN = "plain"  # one picture and one caption
_STYLES = {"plain": PLAIN, "v0_plain": PLAIN, "default": SINGLE, "llava_v0": SINGLE, "v0_mmtag": SINGLE}

# The kinds of defects, in the order of reports, each with a few words for a table.
KINDS = {
    "not_an_object": "no JSON object",
    "no_turns": "no conversation",
    "turn": "a turn is no object",
    "role": "unknown or missing role",
    "order": "turns that do not alternate",
    "text": "text that is null or no string",
    "unicode": "text that is no Unicode",
    "no_answer": "no answer",
    "image_name": "image is not one path",
    "image_marks": "<image> and picture do not match",
    "image_missing": "image file not found",
    "image_unreadable": "image cannot be read",
    "image_size": "image of an impossible size",
    "video_missing": "video not found",
    "other": "LLaVA fails for another reason",
}

# LLaVA makes the whole picture before it shrinks it: of this many pixels, it would take 8 GB and more.
MOST_PIXELS = 1 << 30


@dataclass(frozen=True)
class Defect:
    """Says why LLaVA cannot be trained on a sample.

    Attributes:
        kind: one of `KINDS`.
        reason: what is wrong, as a sentence without a full stop.
    """

    kind: str
    reason: str


def style_of(version: str) -> str:
    """Return how LLaVA reads turns with this --version."""
    return _STYLES.get(version, ALTERNATING)


@dataclass(frozen=True)
class SampleChecks:
    """Checks the samples of one training.

    Attributes:
        image_folder: the folder of --image_folder; None: it is not given.
        padded: --image_aspect_ratio is `pad`.
        style: how the conversation template reads turns.
        edge: to how many pixels the image processor shrinks the shorter side of a picture.
        several: LLaVA-NeXT reads the samples: several images each, or a video.
        video_folder: the folder of --video_folder; None: it is not given.
    """

    image_folder: str | None
    padded: bool = True
    style: str = ALTERNATING
    edge: int = 336
    several: bool = False
    video_folder: str | None = None

    def of(self, sample: Any, *, whole: bool) -> list[Defect]:
        """Return all defects of a sample that its entry in the data file and its picture show.

        Args:
            whole: decode the picture; otherwise only its header is read.
        """
        found = self.structure(sample)
        return found + self.picture(sample, whole=whole) if isinstance(sample, Mapping) else found

    def structure(self, sample: Any) -> list[Defect]:
        """Return the defects that show without a look at any picture."""
        if not isinstance(sample, Mapping):
            return [Defect("not_an_object", f"it is {shown(sample)}, and should be an object with `conversations`")]
        turns, found = _turns(sample)
        for number, turn in enumerate(turns):
            found += _turn_defects(number, turn, roles_matter=self.style != PLAIN)
        if not found:
            found += self._conversation_defects(turns)
        if reason := images_of(sample, several=self.several)[1]:
            found.append(Defect("image_name", reason))
        texts = [turn["value"] for turn in turns if isinstance(turn, Mapping) and isinstance(turn.get("value"), str)]
        if len(texts) == len(turns) > 0:
            found += self._mark_defects(self._read_turns(turns), self._marks(sample))
        return found

    def picture(self, sample: Mapping[str, Any], *, whole: bool = False) -> list[Defect]:
        """Return the defects of a sample's picture; `whole` is that of `of`."""
        names, _ = images_of(sample, several=self.several)
        found = [
            defect
            for name in names
            for defect in self._file_defects(os.path.join(self.image_folder or "", name), whole)
        ]
        if self.several and (reason := missing_video(sample, self.video_folder)):
            found.append(Defect("video_missing", reason))
        return found

    def _file_defects(self, path: str, whole: bool) -> list[Defect]:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return [Defect("image_missing", f"there is no image {_printable(path)}")]
        except (OSError, ValueError) as error:
            return [Defect("image_unreadable", f"the image {_printable(path)} cannot be opened: {_words_of(error)}")]
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for its writer
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            return [Defect("image_unreadable", f"the image {_printable(path)} is {what}")]
        if status.st_size == 0:
            return [Defect("image_unreadable", f"the image {_printable(path)} is empty (0 bytes)")]
        return self._content_defects(path, whole)

    def _content_defects(self, path: str, whole: bool) -> list[Defect]:
        try:
            size = _size_of(path)
            if found := self._size_defects(path, *size):
                return found
            if whole:
                _size_of(path, whole=True)
        except DataError as error:
            return [Defect("image_unreadable", str(error))]
        return []

    def _size_defects(self, path: str, width: int, height: int) -> list[Defect]:
        size = f"the image {_printable(path)} has {width} x {height} pixels"
        if misread(width, height, padded=self.padded):
            return [Defect("image_size", f"{size}, and LLaVA would take a side of 1 or 3 for the colours")]
        long, short = max(width, height), max(1, min(width, height))
        made = long * long if self.padded else self.edge * self.edge * long // short
        if made > MOST_PIXELS:
            return [Defect("image_size", f"{size}: of one so long, LLaVA would make {made:,} pixels")]
        return []

    def _marks(self, sample: Mapping[str, Any]) -> int:
        """Return how many `<image>` the sample needs; 0 if it has no picture."""
        several = self.several
        return marks_wanted(sample, several=several) if has_pictures(sample, several=several) else 0

    def _read_turns(self, turns: Sequence[Any]) -> Sequence[Any]:
        """Return the turns that LLaVA reads."""
        return turns[1:] if self.style == ALTERNATING and turns[0].get("from") == ANSWERING else turns

    def _conversation_defects(self, turns: Sequence[Mapping[str, Any]]) -> list[Defect]:
        if self.style == PLAIN:
            if len(turns) != 2:
                return [Defect("order", f"it has {len(turns)} turns, and a caption of stage 1 has 2")]
            answers = [turns[1]["value"]]
        else:
            read = self._read_turns(turns)
            offset = len(turns) - len(read)
            for number, turn in enumerate(read if self.style == ALTERNATING else ()):
                due = (HUMAN, ANSWERING)[number % 2]
                if turn["from"] != due:
                    reason = f"turn {number + offset} is from {turn['from']!r}, and it is {due!r} whose turn it is"
                    return [Defect("order", reason)]
            answers = [turn["value"] for turn in read if turn["from"] == ANSWERING]
        return [] if any(map(str.strip, answers)) else [Defect("no_answer", "it has no answer to learn")]

    def _mark_defects(self, turns: Sequence[Mapping[str, Any]], wanted: int) -> list[Defect]:
        texts, pictured = [turn["value"] for turn in turns], wanted > 0
        if self.style == PLAIN and pictured:
            if not texts or IMAGE_MARK not in texts[0]:
                return [Defect("image_marks", f"its first turn has no {IMAGE_MARK}")]
        marks = sum(text.count(IMAGE_MARK) for text in texts)
        if pictured and marks != wanted:
            pictures = "one picture" if wanted == 1 else f"{wanted} pictures"
            reason = f"it has {marks or 'no'} {IMAGE_MARK} and {pictures}"
            return [Defect("image_marks", reason + (f"; begin its first question with {IMAGE_MARK}" * (not marks)))]
        if not pictured and (self.style == PLAIN or any(map(_asks_for_a_picture, turns))):
            return [Defect("image_marks", f"it has {IMAGE_MARK if marks else 'neither ' + IMAGE_MARK} and no `image`")]
        return []


def _size_of(path: str, *, whole: bool = False) -> tuple[int, int]:
    """Return width and height of a picture, after decoding it if `whole`.

    Raises:
        DataError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if whole:
                file.convert("RGB")
            return file.size
    except UnidentifiedImageError as error:
        raise DataError(f"the image {_printable(path)} is of no format that can be read, or is damaged") from error
    except Exception as error:  # decoders raise all kinds of errors on a damaged file
        raise DataError(f"the image {_printable(path)} cannot be read: {_words_of(error)}") from error


def misread(width: int, height: int, *, padded: bool) -> bool:
    """Return whether a picture is so small that image processors of transformers misread it.

    They take a first dimension of 1 or 3 for colour channels: one of 1 x 1 pixels fails, one of 3 x 3 gets wrong axes.
    The dimension is the height.

    Args:
        padded: LLaVA pads the picture to a square first: its height is then that of the longer side.
    """
    return (max(width, height) if padded else height) in (1, 3)


def name_of(number: int, sample: Any) -> str:
    """Return how a user finds a sample in the data file: its position, and its id if it has one."""
    identity = sample.get("id") if isinstance(sample, Mapping) else None
    return f"sample {number}" + (f" (id {shown(identity)})" if identity is not None else "")


def _turns(sample: Mapping[str, Any]) -> tuple[list[Any], list[Defect]]:
    if "conversations" not in sample:
        return [], [Defect("no_turns", "it has no `conversations`")]
    turns = sample["conversations"]
    if not isinstance(turns, list):
        return [], [Defect("no_turns", f"its `conversations` is {shown(turns)}, and should be a list of turns")]
    return turns, [] if turns else [Defect("no_turns", "its `conversations` is empty")]


def _turn_defects(number: int, turn: Any, *, roles_matter: bool) -> list[Defect]:
    if not isinstance(turn, Mapping):
        return [Defect("turn", f"turn {number} is {shown(turn)}, and should be an object with `from` and `value`")]
    found = []
    if roles_matter and turn.get("from") not in (HUMAN, ANSWERING):
        role = f"from {shown(turn['from'])}" if "from" in turn else "without `from`"
        found.append(Defect("role", f"turn {number} is {role}; LLaVA knows {HUMAN!r} and {ANSWERING!r}"))
    value = turn.get("value")
    if not isinstance(value, str):
        found.append(
            Defect("text", f"turn {number} " + (f"says {shown(value)}" if "value" in turn else "has no `value`"))
        )
    elif not _is_unicode(value):
        found.append(Defect("unicode", f"turn {number} holds half of a surrogate pair, which no tokenizer reads"))
    return found


def _printable(path: str) -> str:
    # Names may hold line ends, and halves of surrogate pairs, which no terminal takes.
    return path if path.isprintable() else repr(path)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _asks_for_a_picture(turn: Mapping[str, Any]) -> bool:
    """Return whether a turn asks for a picture as LLaVA's data does; elsewhere, `<image>` may be a word of XML."""
    text = turn["value"].strip()
    return turn.get("from") == HUMAN and (text.startswith(IMAGE_MARK) or text.endswith(IMAGE_MARK))


def _words_of(error: Exception) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error or type(error).__name__)
