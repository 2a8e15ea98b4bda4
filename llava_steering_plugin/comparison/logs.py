"""Read the logs of programs: the end of one that failed, and how far one is that runs."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

LINES, BYTES = 12, 20_000
# The progress that tqdm writes, in trainings: 12/300 [
_STEPS = re.compile(rb"(\d+)/(\d+) \[")
# A training's own bar has no words before it, as that of loading a model has.
_BARE = re.compile(rb"[\r\n] *\d+%\|[^|\r\n]*\| *\d+/(\d+) \[")


def end_of(log: Path, status: int, program: str) -> str:
    """Return why a program failed: its exit status, the last lines of its log, and where the log is."""
    ended = f"status {status}" if status > 0 else f"signal {_name(-status)}"
    shown = "\n".join(f"  {line}" for line in last_lines(log)) or "  (nothing)"
    return f"{program} ended with {ended}:\n{shown}\nThe whole log: {log}"


def summary(error: str) -> str:
    """Return the last line of a log in what `end_of` has returned, and where the log is; other errors as they are."""
    lines = error.splitlines()
    return error if len(lines) < 3 else f"{lines[0]} {lines[-2].strip()} ({lines[-1]})"


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log, without the states of progress bars."""
    text = _tail(log).decode("utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("$ ") and not _STEPS.search(line.encode())][-LINES:]


class Progress:
    """Follows the steps of a training in its log, and not the bars of the evaluations that it stops for."""

    def __init__(self, log: Path):
        self.log = log
        self._total: bytes | None = None

    def now(self) -> tuple[int, int] | None:
        """Return the step that the training is at and how many there are; None while its log does not say."""
        if self._total is None:
            begun = _BARE.search(_tail(self.log))
            self._total = begun[1] if begun else None
        found = [step for step, total in _STEPS.findall(_tail(self.log)) if total == self._total]
        return (int(found[-1]), int(self._total)) if found and self._total is not None else None


def _tail(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - BYTES))
            return file.read()
    except OSError:
        return b""


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
