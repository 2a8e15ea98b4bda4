"""The program `llava-steering` as a whole: `cli/__init__.py` and `__main__.py`."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_steering_plugin.cli import app


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "patch"),
        (["no-such-command"], 2, "no-such-command"),
        (["patch", "--llava"], 2, "--llava"),
        (["patch", "--llava", "no/such/folder"], 1, "UpstreamError: no LLaVA in no/such/folder"),
    ],
)
def test_the_command_line_answers_with_one_message_and_a_status(
    arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).with_name("llava-steering")), *arguments]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("group", [[], ["diagnose"]], ids=["all", "diagnose"])
def test_the_lists_of_sub_commands_are_not_cut_short_in_a_terminal_of_80_columns(group: list[str]) -> None:
    shown = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"}).output
    commands = shown.partition("Commands:")[2].strip().splitlines()
    assert commands
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_steering_plugin", "--debug", "patch", "--llava", "no/such/folder"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_it_shows_its_version() -> None:
    command = [sys.executable, "-m", "llava_steering_plugin", "--version"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"llava-steering {version('llava-steering-plugin')}\n")
