"""The command line of the benchmarks: every command answers --help at once, with exactly these options."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
from quick_runs import SCRIPTS

TIMED = {"--quick", "--json", "--threads", "--dtype"}
OPTIONS = {
    "mores": TIMED,
    "transformers": TIMED,
    "mixlora": TIMED | {"--seconds"},
    "serving": TIMED | {"--clients", "--engine"},
    "diagnose": TIMED,
    "memory": {"--only", "--json"},
    "soak": {"--minutes", "--clients", "--tolerance", "--json"},
    "routing": {"--data", "--pictures", "--template", "--count", "--seed", "--json"},
    "balance": {"--seeds", "--quick", "--json"},
    "launches": {"--mode", "--json"},
    "diagnostics": {"--quick", "--json", "--threads"},
    "startup": {"--rounds", "--json"},
    "gpu": {"--tiny", "--output", "--tests", "--no-tests"},
}
LISTED = """
import json, sys, typer
from benchmarks.commands import app
commands = typer.main.get_command(app).commands
found = {
    name: [word for option in command.params for word in (*option.opts, *option.secondary_opts) if word[:2] == "--"]
    for name, command in commands.items()
}
print(json.dumps([found, "torch" in sys.modules]))
"""


def test_the_options_are_these_and_are_read_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LISTED], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    found, heavy = json.loads(done.stdout)
    assert {name: set(options) for name, options in found.items()} == OPTIONS
    assert not heavy


@pytest.mark.parametrize("command", [[], *([name] for name in OPTIONS)], ids=" ".join)
def test_help_is_quick_and_names_everything(command: list[str]) -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = [sys.executable, str(SCRIPTS / "benchmarks"), *command, "--help"]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 2, "seconds of processor time"
    for word in OPTIONS[command[0]] if command else OPTIONS:
        assert word in done.stdout


def test_an_unknown_command_is_an_error_of_usage() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "benchmarks"), "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command 'nothing'" in done.stderr


def test_the_benchmark_of_transformers_own_llava_says_which_environment_it_needs() -> None:
    words = [sys.executable, str(SCRIPTS / "benchmarks"), "transformers", "--quick"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "5 or newer is needed" in done.stdout and "scripts/setup.sh --transformers" in done.stdout
    assert "Traceback" not in done.stderr
