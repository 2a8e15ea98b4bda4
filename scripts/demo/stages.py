"""Runs stages once: each has a folder, a log and a key made of all it depends on. A finished one is used again."""

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Two threads where nothing is said: what two cores give; OMP_NUM_THREADS=1 is kinder to a busy machine.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
# What tqdm writes, in upstream's training and evaluation alike.
_STEPS = re.compile(r"(\d+)/(\d+) \[")
_SEED_OF_HASHES = {"PYTHONHASHSEED": "0"}


class StageError(Exception):
    """A stage failed; the message has the end of its log and says where the rest is."""


@dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        folder: what it made.
        key: changes with anything it depends on.
        seconds: how long it took when it ran.
        values: what it has to say.
    """

    folder: Path
    key: str
    seconds: float
    values: dict[str, Any]


class Context:
    """What a running stage may use: its folder, its log, and its progress bar."""

    def __init__(self, folder: Path, threads: int, report: Callable[[int, int], None]):
        self.folder, self.threads, self.report = folder, threads, report
        self.log = folder / "log.txt"

    def run(self, command: Sequence[str], *, say: str | None = None, env: Mapping[str, str] | None = None) -> str:
        """Runs a command, its output into the log; returns its standard output.

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
                env={**os.environ, **_SEED_OF_HASHES, "OMP_NUM_THREADS": str(self.threads), **(env or {})},
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
                # tqdm draws over its line again and again; the last drawing is the state.
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
    """Something to do once.

    Attributes:
        name: also the name of its folder.
        settings: everything that changes its result, as JSON values; the keys of `needs` are added.
        needs: the finished stages it builds on.
        work: does it, and returns what it has to say.
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
    """Runs stages in `root`, or finds them done."""

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
        """The finished stage; it runs only if it was not done with the same key before.

        Raises:
            StageError: it failed; what it made stays for a look, and it runs again next time.
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
        """Two at a time, one thread each: models this small do not gain from a second thread."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            return list(pool.map(lambda stage: self.run(stage, threads=1), stages))

    def _show(self, bar: TaskID, at: int, total: int) -> None:
        self.progress.update(bar, completed=at, total=total)


def _finished(folder: Path, key: str) -> Done | None:
    try:
        record = json.loads((folder / "stage.json").read_text())
    except (OSError, ValueError):
        return None
    return Done(folder, key, record["seconds"], record["values"]) if record["key"] == key else None
