"""Starts several programs, watches them, and stops them together."""

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
    """Raised when one of the programs has ended while the others run."""


@dataclass
class Program:
    """A Python program to start.

    Attributes:
        name: printed before each of its lines.
        command: the command line after `python`.
        is_up: says whether it answers; called until it does.
        environment: variables in addition to this program's own.
        colour: colour of its name.
        hidden: lines that contain this are not printed: they come every few seconds and would crowd out the others.
    """

    name: str
    command: Sequence[str]
    is_up: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)
    colour: str = "cyan"
    hidden: str | None = None


class Programs:
    """Starts programs, prints their output, and stops them all when one ends or the block is left.

    Each gets a session of its own: a Ctrl-C in the terminal reaches only this program, which then stops them in order.

    Args:
        folder: their working directory.
        temporary: the folder of their temporary files.
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

    def start(self, program: Program) -> None:
        """Start a program."""
        self.say(f"starting the {program.name}")
        process = subprocess.Popen(
            [sys.executable, *program.command],
            cwd=self._folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(self._temporary), **program.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: deque[str] = deque(maxlen=LAST_LINES)
        reader = threading.Thread(target=self._show, args=(program, process, lines), daemon=True)
        reader.start()
        self._running.append((program, process, lines, reader))

    def wait(self, program: Program, seconds: float, stop: Callable[[], object]) -> None:
        """Wait until a program is up or `stop` returns true.

        Raises:
            ProgramDied: one of the programs has ended.
            SteeringError: the program is not up after so many seconds.
        """
        end = time.monotonic() + seconds
        while not stop() and not program.is_up():
            self.check()
            if time.monotonic() > end:
                raise SteeringError(
                    f"the {program.name} does not answer {seconds:g} seconds after its start; all is stopped. "
                    f"Its output above, after `{program.name} |`, shows how far it got."
                )
            time.sleep(0.2)

    def check(self) -> None:
        """Check that all programs run.

        Raises:
            ProgramDied: one has ended; the message shows its last lines.
        """
        for program, process, lines, reader in self._running:
            if process.poll() is not None:
                reader.join(2)
                status = f"status {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
                output = "\n".join(f"  {line}" for line in lines) or "  (nothing)"
                raise ProgramDied(
                    f"the {program.name} has ended with {status}; the others are stopped. Its last lines:\n{output}"
                )

    def stop(self) -> None:
        """Stop all programs, the last one first; kill those that have not ended after a while."""
        for _, process, _, _ in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        for program, process, _, reader in reversed(self._running):
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"the {program.name} does not stop and is killed", "yellow")
                process.kill()
                process.wait()
            reader.join(2)
        self._running.clear()

    def say(self, text: str, style: str = "bold") -> None:
        """Print a line of this program's own."""
        self._console.print(Text(text, style))

    def _show(self, program: Program, process: subprocess.Popen[str], lines: deque[str]) -> None:
        for line in process.stdout or ():
            if program.hidden is not None and program.hidden in line:
                continue
            line = line.rstrip("\n")
            lines.append(line)
            # Text, not markup: the output of programs may contain brackets.
            self._console.print(Text.assemble((f"{program.name:>10} | ", program.colour), line), soft_wrap=True)
