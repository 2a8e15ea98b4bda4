"""Processes with upstream's training imported already: they start in milliseconds, and SIGKILL is as real for them.

A server imports once and forks a process for each training or program. Run as a script only; `Forks` starts it. It
reads lines of JSON and answers each with one:

    {"flags": [...], "env": {...}, "log": path, "die_at": n}   ->  the number of the new process, a training
    {"words": [...], "env": {...}, "cwd": path, "files": path} ->  the same, for `python WORDS`
    {"poll": number}                                           ->  its exit status, negative for a signal, or null

Not for what a test promises of the start itself, such as the order of imports. A server of `UPSTREAM` is not for the
hooks of a patched llava on a module that runs as `__main__` either, nor for a foreign package on the path: after
`LIBRARIES`, each process imports llava and this package by itself, from its own PYTHONPATH.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# What changes files in a folder, as Python reports it.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
# What a server imports before it forks: the training of a llava, or what llava is made of and takes most of the time.
UPSTREAM = ("llava.train.train",)
LIBRARIES = (
    "sentencepiece",
    "transformers.modeling_utils",
    "transformers.models.clip.image_processing_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)


class Forks:
    """A server, on this side of its pipes."""

    def __init__(self, env: Mapping[str, str], cwd: Path, imported: Sequence[str] = UPSTREAM):
        self.server = subprocess.Popen(
            [sys.executable, __file__, *imported],
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.count = 0
        self.cwd = cwd
        self._one_at_a_time = threading.Lock()

    def start(
        self, flags: Sequence[str], *, die_at: int | None = None, env: Mapping[str, str] | None = None
    ) -> tuple[int, Path]:
        """Begins a training; its number as a process, which leads a group of its own, and its log.

        Args:
            flags: upstream's.
            die_at: SIGKILL just before the n-th time that it changes a file in its checkpoints; None: never.
            env: what it has in its environment beside the server's.
        """
        self.count += 1
        log = self.cwd / f"{self.count}.log"
        request = {"flags": list(flags), "env": dict(env or {}), "log": str(log), "die_at": die_at}
        return int(self._ask(request)), log

    def run(
        self,
        *words: str,
        cwd: Path,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        timeout: float = 500,
    ) -> subprocess.CompletedProcess[str]:
        """Do what `subprocess.run([sys.executable, *words])` does.

        Args:
            words: they begin with -m and a module, -c and code, or a script.
            cwd: where it runs.
            stdin: what it may read.
            env: what it has in its environment beside the server's; a PYTHONPATH takes the place of the server's.
            timeout: in seconds; it is killed after that.
        """
        with self._one_at_a_time:
            self.count += 1
            files = self.cwd / str(self.count)
        files.mkdir()
        (files / "stdin").write_text(stdin)
        request = {"words": list(words), "env": dict(env or {}), "cwd": str(cwd), "files": str(files)}
        status = self.wait(int(self._ask(request)), timeout)
        said, warned = ((files / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([sys.executable, *words], status, said, warned)

    def wait(self, process: int, timeout: float = 500) -> int:
        """Return the exit status of a process, once it has ended; one that takes too long is killed."""
        end = time.monotonic() + timeout
        while (status := self._ask({"poll": process})) is None:
            if time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
            time.sleep(0.05)
        return int(status)

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        with self._one_at_a_time:
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server has ended with {self.server.wait(60)}")
        return json.loads(answer)


def serve() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # no process goes through all that was imported to find garbage, nor copies its memory for that
    # Answers alone go through the pipe: whatever the imports wrote on standard output went elsewhere.
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            process, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = os.fork()
            if answer == 0:
                train(request) if "flags" in request else run(request)
            with suppress(ProcessLookupError, PermissionError):
                os.setpgid(answer, answer)  # here and there: whoever comes first, it is done when the answer comes
        os.write(ANSWERS, f"{json.dumps(answer)}\n".encode())


def run(request: dict[str, Any]) -> None:
    """Run a program in this process, which was forked for it, as Python would, and end it."""
    status = 1
    try:
        os.setpgid(0, 0)
        for stream, name in enumerate(("stdin", "stdout", "stderr")):
            flags = os.O_WRONLY | os.O_CREAT if stream else os.O_RDONLY
            os.dup2(os.open(Path(request["files"]) / name, flags), stream)
        os.chdir(request["cwd"])
        _search(os.environ.get("PYTHONPATH", ""), request["env"].get("PYTHONPATH"))
        os.environ.update(request["env"])
        sys.stdin = open(0, closefd=False)  # the server's own has read ahead
        _run_as_main(request["words"], request["cwd"])
        status = 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            sys.stderr.write(f"{stopped.code}\n")
        else:
            status = stopped.code or 0
    except Exception:
        logging.exception("the program failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _search(servers: str, own: str | None) -> None:
    """Put the folders of a PYTHONPATH on the path, in the place of the server's."""
    if own is not None:
        others = [folder for folder in sys.path[1:] if folder not in servers.split(os.pathsep)]
        sys.path[1:] = [*filter(None, own.split(os.pathsep)), *others]


def _run_as_main(words: Sequence[str], cwd: str) -> None:
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv, sys.path[0] = list(words[1:]), cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], cwd
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = list(words), str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def train(request: dict[str, Any]) -> None:
    """Trains in this process, which was forked for it, and ends it."""
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ.update(request["env"])
        from llava_steering_plugin.upstream.cuda_to_cpu import redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
        flags = request["flags"]
        if request["die_at"] is not None:
            _die_at(request["die_at"], flags[flags.index("--output_dir") + 1])
        if "--deepspeed" in flags:
            from llava_steering_plugin.training.deepspeed import start_on_cpu

            start_on_cpu()
        import torch
        from llava.train import train as upstream

        sys.argv = ["train.py", *flags]
        torch.manual_seed(0)  # the projector is drawn before the Trainer seeds anything
        upstream.train()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except Exception:
        logging.exception("the training failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _die_at(count: int, output: str) -> None:
    """Kills this process just before the count-th time that it changes something below `output`."""
    left = count

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(f"{output}{os.sep}"):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    os.dup2(2, 1)
    serve()
