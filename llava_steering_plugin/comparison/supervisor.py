"""Run the programs of a comparison, and end them all when the comparison is gone: `python -m` of this file.

It reads lines of JSON and answers each with one; `processes.py` is the other side.

    {"start": [words], "env": {...}, "log": path, "fork": bool}  ->  the number of the new process
    {"poll": number}                                             ->  its exit status, negative for a signal, or null
    {"signal": number, "to": number of a process}                ->  true

Where its input ends, the comparison was killed, and so are all programs: two of them must never write to one folder.

With --preload, LLaVA's training is imported once, and `python -m MODULE` is a fork of this process: trainings of
seconds start at once. Nothing else has run in it. It does not fork where there are threads or a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import Any

PRELOAD = "--preload"
# What a program needs first. Programs that run as `__main__` are not among them.
MODULES = (
    "llava.train.train",
    "llava_steering_plugin.training.measured",
    "llava_steering_plugin.inference.models",
    "llava_steering_plugin.inference.asking.answering",
)


class Supervisor:
    """Starts programs, each as the leader of a group of its own."""

    def __init__(self) -> None:
        self.running: dict[int, subprocess.Popen[bytes] | None] = {}
        self.can_fork = False

    def preload(self) -> None:
        """Import what the programs need, as `launch` does; where that fails, they say why when they are started."""
        from importlib import import_module

        from llava_steering_plugin.errors import SteeringError
        from llava_steering_plugin.lazy_imports import defer_compilation
        from llava_steering_plugin.upstream.install import install

        defer_compilation()
        try:
            with redirect_stdout(sys.stderr):
                install()
                for module in MODULES:
                    import_module(module)
        except (ImportError, RuntimeError, OSError, AttributeError, SteeringError):
            return
        gc.freeze()  # no process goes through all that was imported to find garbage, nor copies its memory for that
        import torch

        # A look at a GPU, which some of these imports take, is already too much for a process that is to be forked.
        self.can_fork = threading.active_count() == 1 and not torch.cuda.is_available()

    def answer(self, request: Mapping[str, Any]) -> Any:
        """Do what a line asks for, and return the answer. In a process that was forked, `Forked` is raised."""
        if "start" in request:
            return self._start(request)
        if "poll" in request:
            return self._poll(int(request["poll"]))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(request["to"]), int(request["signal"]))
        return True

    def kill(self) -> None:
        """End all programs at once."""
        for process in self.running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)

    def _start(self, request: Mapping[str, Any]) -> int:
        words, env = list(request["start"]), {**os.environ, **request["env"]}
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if request["fork"] and self.can_fork:
            process = os.fork()
            if process == 0:
                raise Forked(words[2:], request["env"], log)
            with suppress(ProcessLookupError, PermissionError):
                os.setpgid(process, process)  # here and there: whoever comes first
            self.running[process] = None
        else:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            started = subprocess.Popen(words, env=env, start_new_session=True, **streams)  # type: ignore[call-overload]
            process = started.pid
            self.running[process] = started
        os.close(log)
        return process

    def _poll(self, process: int) -> int | None:
        started = self.running[process]
        if started is not None:
            status: int | None = started.poll()
        else:
            ended, raw = os.waitpid(process, os.WNOHANG)
            status = os.waitstatus_to_exitcode(raw) if ended else None
        if status is not None:
            # What it has started, such as workers that read data, may not outlive it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)
            del self.running[process]
        return status


class Forked(Exception):
    """Raised in a new process, which becomes a program.

    Args:
        words: of `python -m`, the module first.
        env: what it has in its environment beside the supervisor's.
        log: the number of the open file for its output.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: int):
        super().__init__()
        self.words, self.env, self.log = list(words), dict(env), log

    def run(self, answers: int) -> None:
        """Run the program, as `python -m` does."""
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.close(answers)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        sys.stdin = open(0, closefd=False)
        for stream in (1, 2):
            os.dup2(self.log, stream)
        os.close(self.log)
        os.environ.update(self.env)
        module = self.words[0]
        sys.orig_argv = [sys.executable, "-m", *self.words]
        sys.argv = list(self.words)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever imports print goes elsewhere
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the comparison says when to end
    supervisor = Supervisor()
    if PRELOAD in sys.argv[1:]:
        supervisor.preload()
    try:
        for line in sys.stdin:
            os.write(answers, f"{json.dumps(supervisor.answer(json.loads(line)))}\n".encode())
    except Forked as program:
        forked = program
    else:
        supervisor.kill()
        return
    forked.run(answers)


if __name__ == "__main__":
    main()
