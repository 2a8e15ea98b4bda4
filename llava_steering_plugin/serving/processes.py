"""Programs that are started together, watched, and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llava_steering_plugin.errors import SteeringError

LAST_LINES = 30
GRACE_SECONDS = 20.0


class ProgramDied(SteeringError):
    """A program that was to run for as long as the others has ended."""


@dataclass
class Program:
    """One program.

    Attributes:
        name: before each of its lines.
        command: without the interpreter: what follows `python`.
        up: says whether it answers; asked again until it does.
        environment: what it is given beside this program's own variables.
        colour: of its name.
        unshown: lines with this in them are not shown: they come every few seconds and push everything else away.
    """

    name: str
    command: Sequence[str]
    up: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    colour: str = "cyan"
    unshown: str | None = None


class Programs:
    """Starts programs one after the other, shows what they say, and ends them all when one ends or the block is left.

    They get sessions of their own: a Ctrl-C in the terminal reaches only this program, which then ends them in order.

    Args:
        folder: their working directory.
        temporary: where they put temporary files.
    """

    def __init__(self, console: Console, folder: Path, temporary: Path):
        self._console = console
        self._folder = folder
        self._temporary = temporary
        self._running: list[tuple[Program, subprocess.Popen[str], deque[str], threading.Thread]] = []

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, part: Program) -> None:
        """Starts a part."""
        self.say(f"starting the {part.name}")
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=self._folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(self._temporary), **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: deque[str] = deque(maxlen=LAST_LINES)
        reader = threading.Thread(target=self._show, args=(part, process, lines), daemon=True)
        reader.start()
        self._running.append((part, process, lines, reader))

    def wait(self, part: Program, seconds: float, stop: Callable[[], object]) -> None:
        """Waits until a part is up, or until `stop` says so.

        Raises:
            ProgramDied: one of those that were started has ended.
            SteeringError: it is not up after so many seconds.
        """
        end = time.monotonic() + seconds
        while not stop() and not part.up():
            self.check()
            if time.monotonic() > end:
                raise SteeringError(
                    f"the {part.name} was started and does not answer after {seconds:g} seconds; all is stopped. "
                    f"Its lines above, after `{part.name} |`, say how far it has come."
                )
            time.sleep(0.2)

    def check(self) -> None:
        """Raises ProgramDied, with the last lines, if a part has ended."""
        for part, process, lines, reader in self._running:
            if process.poll() is not None:
                reader.join(2)
                how = f"status {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
                said = "\n".join(f"  {line}" for line in lines) or "  (nothing)"
                raise ProgramDied(
                    f"the {part.name} has ended with {how}; the others are stopped. Its last lines:\n{said}"
                )

    def stop(self) -> None:
        """Ends all parts, the last first: politely, and after a while otherwise."""
        for _, process, _, _ in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        for part, process, _, reader in reversed(self._running):
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"the {part.name} does not stop by itself and is ended", "yellow")
                process.kill()
                process.wait()
            reader.join(2)
        self._running.clear()

    def say(self, text: str, style: str = "bold") -> None:
        """A line of this program's own."""
        self._console.print(Text(text, style))

    def _show(self, part: Program, process: subprocess.Popen[str], lines: deque[str]) -> None:
        for line in process.stdout or ():
            if part.unshown is not None and part.unshown in line:
                continue
            line = line.rstrip("\n")
            lines.append(line)
            # Text, not markup: what programs print may hold brackets.
            self._console.print(Text.assemble((f"{part.name:>10} | ", part.colour), line), soft_wrap=True)
