"""Programs start, say how they ended, and end with the comparison that started them, also if that was killed.

Covers `comparison/supervisor.py`. That programs which are forks of it do what they do otherwise: test_run.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_steering_plugin.comparison.processes import Command, Processes
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.whole_files import runs

FOREVER = "import time; print('up', flush=True); time.sleep(1000)"
# It starts one that runs forever, and says both numbers.
PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {FOREVER!r}])
print(os.getpid(), child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(False, tmp_path / "supervisor.log")
    yield started
    started.close()


def until(happened: Callable[[], bool]) -> None:
    """Wait for an event; the test's own limit is the only one."""
    while not happened():
        time.sleep(0.02)


def numbers_in(log: Path) -> list[int]:
    """The numbers in the first line of a log that has nothing else in it; another program may have written more."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    found = [words for words in lines if words and all(word.isdigit() for word in words)]
    return [int(word) for word in found[0]] if found else []


def python(code: str, log: Path, **env: str) -> Command:
    return Command([sys.executable, "-c", code], log, env)


def ended(processes: Processes, process: int) -> int:
    found: list[int | None] = [None]
    until(lambda: found.append(processes.poll(process)) or found[-1] is not None)
    assert found[-1] is not None
    return found[-1]


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for is a zombie, and has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return not runs(process)


def test_a_program_writes_its_log_and_says_how_it_ended(processes: Processes, tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['SAID'], file=sys.stderr); sys.exit(3)"
    log = tmp_path / "log"
    log.write_text("before\n")
    assert ended(processes, processes.start(python(code, log, SAID="hello"))) == 3
    before, command, said = log.read_text().splitlines()
    assert (before, said) == ("before", "hello") and command.startswith("$ ")


def test_a_signal_reaches_a_program_and_all_that_it_has_started(processes: Processes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = processes.start(python(PARENT, log))
    until(lambda: len(numbers_in(log)) == 2)
    numbers = numbers_in(log)
    processes.signal(process, signal.SIGKILL)
    assert ended(processes, process) == -signal.SIGKILL
    until(lambda: all(map(gone, numbers)))


def test_programs_end_when_the_comparison_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import sys, time
from pathlib import Path
from llava_steering_plugin.comparison.processes import Command, Processes
processes = Processes(False, Path({str(tmp_path / "supervisor.log")!r}))
processes.start(Command([sys.executable, "-c", {PARENT!r}], Path({str(log)!r})))
time.sleep(1000)
"""
    comparison = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: len(numbers_in(log)) == 2)
    numbers = numbers_in(log)
    assert not any(map(gone, numbers))
    comparison.kill()
    comparison.wait()
    until(lambda: all(map(gone, numbers)))


def test_a_supervisor_that_was_killed_is_an_error_that_names_its_log(processes: Processes, tmp_path: Path) -> None:
    os.kill(processes._supervisor.pid, signal.SIGKILL)
    processes._supervisor.wait()
    with pytest.raises(SteeringError, match=r"supervisor\.log"):
        processes.start(python("", tmp_path / "log"))
    processes.close()  # the question that nobody read is no second error
