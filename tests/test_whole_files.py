"""A file is there whole or as it was before, and nothing half-written stays beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_steering_plugin.whole_files import SUFFIX, partials, remove_partials, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "it.csv"
    for text in ("old\n", "né\r\nw\n"):
        write_whole(file, text)
        assert file.read_bytes() == text.encode()
        assert names(tmp_path) == ["it.csv"]


def test_where_one_of_several_fails_all_stay_as_they_were(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    with pytest.raises(KeyError), partials(old, new) as parts:
        for part in parts:
            part.write_text("half")
        raise KeyError
    with pytest.raises(FileNotFoundError), partials(old, new) as parts:
        parts[0].write_text("whole")  # and the other one is forgotten
    with pytest.raises(UnicodeEncodeError):
        write_whole(old, "half a character: \ud800")
    assert old.read_text() == "old"
    assert names(tmp_path) == ["old"]
    with partials(old, new) as parts:
        for part in parts:
            part.write_text("whole")
    assert (old.read_text(), new.read_text()) == ("whole", "whole")
    assert names(tmp_path) == ["new", "old"]


def test_what_cannot_be_put_in_its_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "it", "text")
    assert names(tmp_path) == ["folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from llava_steering_plugin.whole_files import partials

with partials(Path(sys.argv[1])) as (part,):
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "it"
    file.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, file], check=False)
    assert done.returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    (left,) = tmp_path.glob(f".it.*{SUFFIX}")
    kept = [f".it.{os.getppid()}{SUFFIX}", f".it.word{SUFFIX}", left.name.replace("it", "other")]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / f".it.{os.getpid()}{SUFFIX}").mkdir()
    remove_partials(tmp_path, ["it"])
    assert names(tmp_path) == sorted([*kept, "it"])
