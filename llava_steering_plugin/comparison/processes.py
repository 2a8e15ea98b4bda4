"""Start programs through a supervisor, which ends them when this process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison.supervisor import PRELOAD
from llava_steering_plugin.errors import SteeringError

# PEFT writes sets of names in the order of their hashes: without this, two equal trainings write different files.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Command:
    """A program to run.

    Attributes:
        words: the whole command line.
        log: gets its output, after what is there.
        env: variables in addition to this program's own.
        fork: it is `python -m MODULE ...` and may be a fork of the supervisor.
    """

    words: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    fork: bool = True


class Processes:
    """Starts programs and asks how they are. All are in sessions or groups of their own: Ctrl-C does not reach them.

    Args:
        preload: import LLaVA's training once for all of them.
        log: gets what the supervisor itself prints.
        keep: open files that all of them keep open, such as a lock.
    """

    def __init__(self, preload: bool, log: Path, keep: Sequence[int] = ()):
        words = ["-m", "llava_steering_plugin.comparison.supervisor", *([PRELOAD] if preload else [])]
        with log.open("ab") as file:
            self._supervisor = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
                pass_fds=tuple(keep),
            )
        self._log = log

    def start(self, command: Command) -> int:
        """Start a program and return its number.

        Raises:
            OSError: its log cannot be written.
        """
        with command.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command.words)}\n")
        words = list(command.words)
        fork = command.fork and words[:2] == [sys.executable, "-m"]
        request = {"start": words, "env": dict(command.env), "log": str(command.log), "fork": fork}
        return int(self._ask(request))

    def poll(self, process: int) -> int | None:
        """Return the exit status of a program, negative for a signal; None while it runs."""
        status: int | None = self._ask({"poll": process})
        return status

    def signal(self, process: int, number: int) -> None:
        """Send a signal to a program and all that it has started."""
        self._ask({"signal": number, "to": process})

    def close(self) -> None:
        """End the supervisor, and with it all programs that still run."""
        assert self._supervisor.stdin is not None and self._supervisor.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and did not read what was asked last
            self._supervisor.stdin.close()
        try:
            self._supervisor.wait(20)
        except subprocess.TimeoutExpired:  # it is importing, and has started nothing yet
            self._supervisor.send_signal(signal.SIGKILL)
            self._supervisor.wait()
        self._supervisor.stdout.close()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._supervisor.stdin is not None and self._supervisor.stdout is not None
        try:
            self._supervisor.stdin.write(json.dumps(request) + "\n")
            self._supervisor.stdin.flush()
            answer = self._supervisor.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SteeringError(f"the process that starts all programs has ended; see {self._log}.")
        return json.loads(answer)
