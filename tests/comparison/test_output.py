"""An output folder belongs to one comparison, and to one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from compared import content
from tiny_llava import TinyLlava

from llava_steering_plugin.comparison import output as folder
from llava_steering_plugin.comparison.cells import Plan, plan_cells
from llava_steering_plugin.comparison.output import LOG
from llava_steering_plugin.comparison.processes import Processes
from llava_steering_plugin.comparison.reading import comparison_from
from llava_steering_plugin.comparison.records import DONE
from llava_steering_plugin.comparison.training import TRAINED, Trained, find_trained
from llava_steering_plugin.errors import ArgumentsError


def planned(tiny: TinyLlava, tmp_path: Path, **changed: object) -> Plan:
    return plan_cells(comparison_from(content(tiny, tmp_path, **changed), tmp_path))


def finish(plan: Plan, place: int) -> str:
    """Have a cell trained, as far as its files tell."""
    cell = plan.cells[place]
    (cell.folder(plan.comparison.output) / "model").mkdir(parents=True)
    (cell.folder(plan.comparison.output) / TRAINED).write_text(json.dumps(asdict(Trained(DONE))))
    return cell.id


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    assert folder.output_problems(tmp_path / "new") == []
    assert folder.output_problems(tmp_path) == []
    (tmp_path / "thesis.tex").write_text("work")
    (problem,) = folder.output_problems(tmp_path)
    assert "holds other files, and no comparison" in problem
    (problem,) = folder.output_problems(tmp_path / "thesis.tex")
    assert "is no folder" in problem


def test_a_comparison_that_could_not_start_leaves_a_folder_in_which_it_can(tmp_path: Path) -> None:
    with folder.locked(tmp_path, lambda: None) as lock:
        Processes(False, tmp_path / LOG, [lock]).close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [folder.LOCK, LOG]
    assert folder.output_problems(tmp_path) == []


def test_an_edited_file_keeps_what_is_valid_and_the_rest_stays_on_the_disk(tiny: TinyLlava, tmp_path: Path) -> None:
    plan = planned(tiny, tmp_path)
    plan.comparison.output.mkdir()
    folder.begin(plan, plan.comparison.output)
    kept, left = finish(plan, 1), finish(plan, 2)
    edited = planned(tiny, tmp_path, learning_rates=[0.001])
    assert folder.refuse_another(plan, plan.comparison.output) == []
    assert folder.refuse_another(edited, plan.comparison.output) == [left]
    assert find_trained(plan.comparison.output / "cells" / kept) == Trained(DONE)


def test_the_output_of_another_comparison_is_refused_and_the_difference_named(tiny: TinyLlava, tmp_path: Path) -> None:
    plan = planned(tiny, tmp_path)
    plan.comparison.output.mkdir()
    folder.begin(plan, plan.comparison.output)
    finish(plan, 1)
    data = content(tiny, tmp_path)
    data["defaults"]["max_steps"] = 9
    other = plan_cells(comparison_from(data, tmp_path))
    with pytest.raises(ArgumentsError) as error:
        folder.refuse_another(other, plan.comparison.output)
    assert "1 finished cells of another comparison" in str(error.value)
    assert "flag max_steps 4: only there" in str(error.value) and "flag max_steps 9: only now" in str(error.value)


def test_two_comparisons_in_one_folder_are_refused(tmp_path: Path) -> None:
    with folder.locked(tmp_path, lambda: None):
        code = (
            "from pathlib import Path; from llava_steering_plugin.comparison.output import locked\n"
            f"with locked(Path({str(tmp_path)!r}), lambda: None): pass"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"in use by another comparison (process {os.getpid()})" in done.stderr


def test_programs_of_a_comparison_that_was_killed_are_waited_for(tmp_path: Path) -> None:
    """One that outlives its comparison keeps the lock, and its end frees the folder."""
    code = (
        "import os, signal, subprocess, sys\nfrom pathlib import Path\n"
        "from llava_steering_plugin.comparison.output import locked\n"
        f"with locked(Path({str(tmp_path)!r}), lambda: None) as lock:\n"
        "    left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], pass_fds=[lock])\n"
        "    print(left.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    left = int(killed.stdout.readline())
    killed.wait()
    with folder.locked(tmp_path, lambda: os.kill(left, signal.SIGKILL)):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArgumentsError, match="cannot be written"),
        folder.locked(tmp_path / "file" / "out", lambda: None),
    ):
        pass
