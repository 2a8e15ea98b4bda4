"""The copies of adapters that a server keeps while it runs; what they are for is tested in test_requests.py."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_bases import ROOT

from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.vllm import copies

SERVER = """
import os, subprocess, sys
from llava_steering_plugin.vllm.copies import VARIABLE, copy, digest_of, name_folder

name_folder()
digest = digest_of(sys.argv[1])
copy(sys.argv[1], digest)
# A worker, which loads the plugin too, and ends before its server.
subprocess.run([sys.executable, "-c", "from llava_steering_plugin.vllm.copies import name_folder; name_folder()"])
where = os.environ[VARIABLE]
print(where, oct(os.stat(where).st_mode), open(f"{where}/{digest}/adapter_model.safetensors").read())
"""


def test_a_copy_is_nobody_elses_and_gone_when_the_server_has_ended(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_text("weights")
    env = {name: value for name, value in os.environ.items() if name != copies.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", SERVER, tmp_path],
        env=env | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    where, mode, content = done.stdout.split()
    assert Path(where).parent == tmp_path and stat.S_IMODE(int(mode, 8)) == 0o700 and content == "weights"
    assert not Path(where).exists() and done.stderr == ""


def test_where_nothing_can_be_copied_that_is_said_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / WEIGHTS).write_text("weights")
    monkeypatch.setenv(copies.VARIABLE, str(tmp_path / WEIGHTS / "no-folder"))
    copies.copy(tmp_path, "a" * 32)
    assert "is not copied" in caplog.text and str(tmp_path) in caplog.text


def test_what_changes_while_it_is_copied_is_refused_and_copied_when_it_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WEIGHTS).write_text("weights")
    digest = copies.digest_of(tmp_path)
    monkeypatch.setenv(copies.VARIABLE, str(tmp_path / "copies"))
    (tmp_path / WEIGHTS).write_text("others")
    with pytest.raises(AdapterError, match="changed while it was copied"):
        copies.copy(tmp_path, digest)
    assert list((tmp_path / "copies").iterdir()) == []
    (tmp_path / WEIGHTS).write_text("weights")
    copies.copy(tmp_path, digest)
    assert (tmp_path / "copies" / digest / WEIGHTS).read_text() == "weights"
