"""The progress that the commands of `diagnose` show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from llava_steering_plugin.inference.quiet import quiet_libraries


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show on standard error how many questions of each model are done, and the time left.

    What libraries log while models are loaded would fill pages around it. Upstream's loader of LoRAs prints: standard
    output is for the names of the files.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with quiet_libraries(), redirect_stdout(sys.stderr), Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield show
