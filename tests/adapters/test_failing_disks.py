"""Saving to a disk that fails (`adapters/stored/writing.py`): one clear error, and the adapter that it names."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_files import as_version_0_1
from disks import NOBODY, file_system, largest_file, mount, without_privileges
from steered import contents, strengthen

from llava_steering_plugin import load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.stored.folder import CARD, CONFIG, LLAVA_CONFIG, OLD_CONFIG, WEIGHTS
from llava_steering_plugin.errors import AdapterError, SteeringError
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]


@pytest.mark.parametrize("size", [0, 500, 5000])
def test_a_save_that_runs_out_of_space_leaves_the_previous_adapter(
    model: Any, saved: Path, steered: Steered, size: int
) -> None:
    before = contents(saved)
    steered(rank=4)
    with pytest.raises(AdapterError, match=r"could not be written to .*pets.*unharmed") as error, largest_file(size):
        save_adapter(model, saved)
    assert len(str(error.value).splitlines()) == 1
    assert contents(saved) == before
    remove(model)
    load_adapter(model, saved)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with file_system(tmp_path / "disk", "64k") as disk:
        yield disk


@pytest.mark.parametrize("form", ["now", "0.1"])
def test_a_full_disk_leaves_the_previous_adapter(model: Any, steered: Steered, small_disk: Path, form: str) -> None:
    attachment = steered()
    save_adapter(model, small_disk / "pets")
    if form == "0.1":
        as_version_0_1(small_disk / "pets")
    before = contents(small_disk / "pets")
    attachment.remove()
    steered(rank=16)
    with pytest.raises(AdapterError, match="could not be written"):
        save_adapter(model, small_disk / "pets")
    assert contents(small_disk / "pets") == before
    with pytest.raises(AdapterError, match="could not be written"):
        save_adapter(model, small_disk / "new")
    assert not list((small_disk / "new").iterdir())


def test_a_read_only_disk_is_one_clear_error(model: Any, steered: Steered, small_disk: Path) -> None:
    attachment = steered()
    save_adapter(model, small_disk / "pets")
    before = contents(small_disk / "pets")
    mount("-o", "remount,ro", str(small_disk))
    strengthen(attachment, seed=1)
    for folder in (small_disk / "pets", small_disk / "new"):
        with pytest.raises(AdapterError, match="Read-only file system"):
            save_adapter(model, folder)
    assert contents(small_disk / "pets") == before


def test_a_target_that_cannot_be_a_folder_is_one_clear_error(model: Any, steered: Steered, tmp_path: Path) -> None:
    steered()
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self/adapter")):
        with pytest.raises(AdapterError, match="could not be written to"):
            save_adapter(model, target)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [CONFIG, LLAVA_CONFIG, CARD])
def test_a_copy_that_cannot_be_replaced_leaves_the_previous_adapter(
    model: Any, saved: Path, steered: Steered, name: str
) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    weights = (saved / WEIGHTS).read_bytes()
    steered(rank=4)
    with pytest.raises(AdapterError, match=rf"could not be written to .*Is a directory: '.*{name}'.*unharmed"):
        save_adapter(model, saved)
    assert (saved / WEIGHTS).read_bytes() == weights
    assert not list(saved.glob(".*")), "no partial files"


@pytest.mark.parametrize("name", [CONFIG, LLAVA_CONFIG, CARD, OLD_CONFIG])
def test_a_copy_that_turns_out_to_belong_to_somebody_else_is_said_and_the_new_adapter_is_saved(
    model: Any, steered: Steered, name: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files to somebody else")
    attachment = steered()
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        folder = Path(outer) / "pets"
        save_adapter(model, folder)
        (folder / OLD_CONFIG).write_text('{"peft_type": "LLAVA_MORES"}')
        folder.chmod(0o1777)  # as /tmp: only the owner of a file may replace it
        for file in folder.iterdir():
            os.chown(file, 0 if file.name == name else NOBODY, -1)
        attachment.remove()
        steered(rank=4)
        with without_privileges(), pytest.raises(AdapterError, match=r"^the adapter is saved to .*not permitted"):
            save_adapter(model, folder)
        remove(model)
        assert load_adapter(model, folder).mode == MoReS(rank=4, tokens="all")
        assert not list(folder.glob(".*")), "no partial files"


def test_saving_a_model_without_an_adapter_says_so(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="carries no adapter; attach"):
        save_adapter(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
