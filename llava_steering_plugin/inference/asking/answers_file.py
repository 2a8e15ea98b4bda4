"""The answers of a run, on disk as they come: a run that was killed goes on where it ended, to the same file.

While a run is unfinished, a second file beside the answers holds its settings. The same command then keeps the answers
that are there and asks the rest, in the same batches. Without that file, a run begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from llava_steering_plugin.errors import ArgumentsError, listing
from llava_steering_plugin.foreign_files import INDEX_BYTES, WEIGHT_BYTES, opened
from llava_steering_plugin.inference.asking.answering import Answer
from llava_steering_plugin.inference.asking.questions import Question

SUFFIX = ".unfinished"


class AnswersFile:
    """Writes answers, and finds those of a run that was interrupted.

    Args:
        path: LLaVA's answer.jsonl. Something else than a file, such as a pipe, is written to and not looked at.
        settings: all that the answers depend on, besides the questions.

    Attributes:
        failed: how many of the questions in it have no answer, but an error.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.unfinished = path.with_name(path.name + SUFFIX)
        self.failed = 0
        self._key = json.dumps(self.settings, sort_keys=True)
        # Unlike pathlib's, these answer also where a name is too long.
        self._is_file = os.path.isfile(path) or not os.path.exists(path)

    def check(self) -> bool:
        """Return whether there is an unfinished run to go on with.

        Raises:
            ArgumentsError: it had other settings.
        """
        if not self._is_file or not os.path.isfile(self.path) or not os.path.isfile(self.unfinished):
            return False
        try:
            before = json.loads(self.unfinished.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):  # it was killed before it had begun
            return False
        changed = sorted(
            name for name in before.keys() | self.settings.keys() if before.get(name) != self.settings.get(name)
        )
        if changed:
            problems = [f"{name} was {before.get(name)!r}, and is {self.settings.get(name)!r} now" for name in changed]
            headline = (
                f"{self.path} holds a part of the answers of a run with other settings. Repeat its settings to go on "
                f"with it, delete {self.unfinished} to begin anew, or choose another --answers-file"
            )
            raise ArgumentsError(listing(headline, problems))
        return True

    def answered(self, questions: Sequence[Question], batch: int) -> int:
        """Return how many questions an unfinished run has answered, in whole batches, and drop what it left behind.

        Raises:
            ArgumentsError: it had other settings, or was asked other questions.
        """
        if not self.check():
            return 0
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last \\n is half a line, or nothing
        count = 0
        errors: list[bool] = []
        for line, question in zip(lines, questions, strict=False):
            found = _object(line)
            metadata = found.get("metadata")
            error = metadata.get("error") if isinstance(metadata, dict) else None
            if found.get("answer_id") != self.identity(count, question, found.get("text"), error):
                if found and (found.get("question_id"), found.get("prompt")) != (question.id, question.text):
                    raise ArgumentsError(
                        f"line {count + 1} of {self.path}, of an unfinished run, answers question "
                        f"{found.get('question_id')!r}, and line {count + 1} of the questions is {question.id!r} now. "
                        f"Give the same questions to go on with it, or delete {self.unfinished} to begin anew."
                    )
                break
            count += 1
            errors.append(error is not None)
        if count < len(questions):
            count -= count % batch
        self.failed = sum(errors[:count])
        with self.path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:count]))
        return count

    def write(self, batches: Iterable[tuple[int, Sequence[Question], Sequence[Answer]]], already: int) -> None:
        """Write answers batch by batch, each on disk before the next is asked for.

        Args:
            batches: for each one, the number of its first question, its questions and their answers.
            already: how many questions have been answered before.

        Raises:
            ArgumentsError: the file cannot be written. What is in it stays, and the same command goes on.
        """
        try:
            with self._opened(already) as file:
                for start, questions, answers in batches:
                    answered = enumerate(zip(questions, answers, strict=True), start)
                    lines = [self._line(number, *each) for number, each in answered]
                    self.failed += sum(answer.error is not None for answer in answers)
                    file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                    _to_disk(file)
        except OSError as error:
            raise ArgumentsError(
                f"--answers-file {self.path} cannot be written any further: {error.strerror}. The answers so far are "
                "in it; the same command goes on with the rest."
            ) from error
        if self._is_file:
            self.unfinished.unlink(missing_ok=True)

    def _opened(self, already: int) -> IO[bytes]:
        if not self._is_file:
            return self.path.open("wb")
        if already:
            return self.path.open("ab")
        file = self.path.open("wb")  # empty first: no line of an earlier run may count as one of this run's
        _to_disk(file)
        with self.unfinished.open("w", encoding="utf-8") as settings:
            json.dump(self.settings, settings, indent=1)
            settings.flush()
            os.fsync(settings.fileno())
        return file

    def _line(self, number: int, question: Question, answer: Answer) -> dict[str, Any]:
        """Return a line of upstream's answer file."""
        return {
            "question_id": question.id,
            "prompt": question.text,
            "text": answer.text,
            "answer_id": self.identity(number, question, answer.text, answer.error),
            "model_id": question.adapter,
            "metadata": {} if answer.error is None else {"error": answer.error},
        }

    def identity(self, number: int, question: Question, text: object, error: object) -> str:
        """Return what tells this answer from all others: the same in a repeated run, and wrong for a changed line."""
        parts = [self._key, number, question.id, question.text, question.images, question.adapter, text, error]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def contents_of(folder: str | os.PathLike[str], *, hashed: bool) -> Any:
    """Return what tells whether a model's or an adapter's files are the same as before.

    Args:
        folder: the folder; a hub id stands for itself.
        hashed: by the values of the weights; else by size and time, as for a base of many GB.
    """
    if not os.path.isdir(folder):
        return str(folder)
    found = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".json") or not file.is_file():
            continue
        status = file.stat()
        limit = INDEX_BYTES if file.suffix == ".json" else WEIGHT_BYTES if hashed else 0
        if status.st_size <= limit:  # nothing reads a larger one either
            found[file.name] = _digest(file, limit)
        else:
            found[file.name] = f"{status.st_size} bytes of {status.st_mtime_ns}"
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _digest(file: Path, limit: int) -> str:
    digest = hashlib.sha256()
    with opened(file, limit) as parts:
        while part := parts.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _object(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line; nothing if it is damaged."""
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    with suppress(OSError):  # a pipe has no disk
        os.fsync(file.fileno())
