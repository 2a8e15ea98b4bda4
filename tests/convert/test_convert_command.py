"""`llava-steering convert`, the command (`cli/convert.py`, `cli/tables.py`): what it shows, and how it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from released_checkpoints import golden, golden_base
from typer.testing import CliRunner

from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import AdapterError, ArgumentsError


def test_the_command_shows_what_it_made_and_what_it_lost(tmp_path: Path) -> None:
    command = ["convert", str(golden("mores")), str(tmp_path / "done"), "--base", golden_base("mores")]
    done = CliRunner().invoke(app, [*command, "--conversation", "vicuna_v1"])
    assert done.exit_code == 0, done.output
    for text in (
        "mores, 774 parameters",
        "tokens f4+l5",
        "3 layers of width 64",
        "Not carried over",
        "text-only samples",
    ):
        assert text in done.output
    assert "conversation template" not in done.output
    assert read(tmp_path / "done").config.conversation == "vicuna_v1"
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, AdapterError) and "--force" in str(again.exception)


def test_a_conversation_template_that_llava_has_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    command = ["convert", str(golden("mores")), str(tmp_path / "done"), "--base", golden_base("mores")]
    done = CliRunner().invoke(app, [*command, "--conversation", "vicuna"])
    assert isinstance(done.exception, ArgumentsError)
    assert "'vicuna'" in str(done.exception) and "vicuna_v1" in str(done.exception)
    assert not (tmp_path / "done").exists()


def test_a_llava_that_does_not_import_keeps_nobody_from_naming_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("raise RuntimeError('Failed to import transformers.models.llama')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["convert", str(golden("mores")), str(tmp_path / "done"), "--base", golden_base("mores")]
    done = CliRunner().invoke(app, [*command, "--conversation", "vicuna_v1"])
    assert done.exit_code == 0, done.output
    assert read(tmp_path / "done").config.conversation == "vicuna_v1"


def test_a_base_in_the_hubs_cache_is_found_by_its_name(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(golden_base("mixlora"), cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    command = [sys.executable, "-m", "llava_steering_plugin", "convert", str(golden("mixlora")), "done"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run(
        [*command, "--base", "somebody/tiny"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "21 tensors of the base in the checkpoint have the values of somebody/tiny" in run.stdout
    assert read(tmp_path / "done").config.base.name_or_path == "somebody/tiny"
