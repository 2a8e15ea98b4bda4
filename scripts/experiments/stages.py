"""Run each stage once: it has a folder, a log, and a key that depends on all its inputs. Finished stages are reused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Two threads by default; OMP_NUM_THREADS=1 leaves more of a busy machine to others.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
# The progress that tqdm writes, in upstream's training and evaluation.
_STEPS = re.compile(r"(\d+)/(\d+) \[")
SEED_OF_HASHES = {"PYTHONHASHSEED": "0"}


class StageError(Exception):
    """A stage failed; the message has the end of its log and the log's path."""


@dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        folder: where its files are.
        key: changes with every input.
        seconds: the time that it took when it ran.
        values: its results, as JSON values.
    """

    folder: Path
    key: str
    seconds: float
    values: dict[str, Any]


class Context:
    """The folder, the log and the progress bar of a running stage."""

    def __init__(self, folder: Path, threads: int, report: Callable[[int, int], None]):
        self.folder, self.threads, self.report = folder, threads, report
        self.log = folder / "log.txt"

    def run(self, command: Sequence[str], *, say: str | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run a command with its output in the log; return its standard output.

        Raises:
            StageError: it ended with an error.
        """
        with self.log.open("a", buffering=1) as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE if say is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=self.folder,
                env={**os.environ, **SEED_OF_HASHES, "OMP_NUM_THREADS": str(self.threads), **(env or {})},
            )
            if say is not None and process.stdin is not None:
                process.stdin.write(say)
                process.stdin.close()
            output: list[str] = []
            reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
            reader.start()
            tail: deque[str] = deque(maxlen=15)
            for line in process.stderr or ():
                log.write(line)
                tail.append(line)
                # tqdm overwrites its line again and again; the last text is the state.
                if found := _STEPS.findall(line):
                    self.report(int(found[-1][0]), int(found[-1][1]))
            status = process.wait()
            reader.join()
            log.write("".join(output))
        if status:
            raise StageError(
                f"{shlex.join(command[:4])} ... ended with {status}:\n{''.join(tail)}The whole log: {self.log}"
            )
        return "".join(output)


@dataclass(frozen=True)
class Stage:
    """A piece of work that is done once.

    Attributes:
        name: also the name of its folder.
        settings: everything that changes its result, as JSON values; the keys of `needs` are added.
        needs: the finished stages that it builds on.
        work: does the work and returns the results, as JSON values.
        code: the modules whose code changes its result.
    """

    name: str
    settings: Mapping[str, Any]
    needs: Sequence[Done]
    work: Callable[[Context], dict[str, Any]]
    code: Sequence[ModuleType] = ()

    @property
    def key(self) -> str:
        sources = [Path(str(module.__file__)).read_text() for module in self.code]
        content = [self.name, self.settings, [done.key for done in self.needs], sources]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Runner:
    """Run stages in folder `root`, or find them done there."""

    def __init__(self, root: Path, console: Console):
        self.root, self.console = root, console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def run(self, stage: Stage, threads: int = THREADS) -> Done:
        """Return the finished stage; run it only if it was not done with the same key before.

        Raises:
            StageError: it failed. Its files stay, and it runs again next time.
        """
        folder = self.root / stage.name
        if done := _finished(folder, stage.key):
            self.console.print(f"[dim]{stage.name}: done before ({done.seconds:.0f} s)[/dim]")
            return done
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        bar = self.progress.add_task(stage.name, total=None)
        started = time.monotonic()
        values = stage.work(Context(folder, threads, lambda at, total: self._show(bar, at, total)))
        done = Done(folder, stage.key, time.monotonic() - started, values)
        self.progress.remove_task(bar)
        self.console.print(f"{stage.name}: {done.seconds:.0f} s")
        record = {"key": done.key, "seconds": round(done.seconds, 1), "values": values}
        partial = folder / "stage.json.partial"
        partial.write_text(json.dumps(record))
        partial.replace(folder / "stage.json")
        return done

    def run_side_by_side(self, stages: Sequence[Stage]) -> list[Done]:
        """Run two stages at a time with one thread each: models this small do not gain from a second thread."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            return list(pool.map(lambda stage: self.run(stage, threads=1), stages))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to another program for the block."""
        self.progress.stop()
        try:
            yield
        finally:
            self.progress.start()

    def _show(self, bar: TaskID, at: int, total: int) -> None:
        self.progress.update(bar, completed=at, total=total)


def _finished(folder: Path, key: str) -> Done | None:
    try:
        record = json.loads((folder / "stage.json").read_text())
    except (OSError, ValueError):
        return None
    return Done(folder, key, record["seconds"], record["values"]) if record["key"] == key else None
