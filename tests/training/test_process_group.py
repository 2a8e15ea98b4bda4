"""Ranks that end while gloo's threads still hold tensors: whole trainings do so in test_launched_programs.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from ports import free_port
from training_runs import subprocess_environment

# What DeepSpeed's engine does: it is never freed, and owns the group.
KEPT = """
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
torch.kept_for_ever = distributed.group.WORLD
"""
PROGRAM = """
import sys, torch
from sitecustomize import starve
from torch import distributed
from llava_steering_plugin.training.process_group import leave_at_exit

distributed.init_process_group("gloo")
{owners}
sys.setswitchinterval(5)  # a thread waits for Python's lock until it is given up
starve()
for _ in range(20):
    distributed.all_reduce(torch.ones(1))
{ending}
"""


@pytest.mark.parametrize("owners", ["", KEPT], ids=["group-freed", "group-kept"])
def test_ranks_end_well_though_gloo_still_holds_tensors(owners: str, tmp_path: Path) -> None:
    for _ in range(2):
        for status, stderr in run(PROGRAM.format(owners=owners, ending="leave_at_exit()"), tmp_path):
            assert status == 0, stderr[-4000:]


def test_leaving_prints_nothing_where_there_is_no_group_or_it_was_left(tmp_path: Path) -> None:
    ending = "leave_at_exit(); leave_at_exit(); distributed.destroy_process_group()"
    for status, stderr in run(PROGRAM.format(owners="", ending=ending), tmp_path):
        assert status == 0 and "Exception" not in stderr and "Error" not in stderr


def run(program: str, folder: Path) -> list[tuple[int, str]]:
    """Run the program on two ranks whose exchange waits for its turn; return exit status and errors of each."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    env = subprocess_environment(folder, {**ranks.starved(folder), **group})
    command = [sys.executable, "-c", program]
    started = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, text=True, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, stderr) for process, stderr in zip(started, errors, strict=True)]
