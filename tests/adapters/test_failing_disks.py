from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import file_system, largest_file, mount
from steered import contents, strengthen

from llava_steering_plugin import load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.folder import CARD, WEIGHTS
from llava_steering_plugin.errors import AdapterError, SteeringError

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


def test_a_full_disk_leaves_the_previous_adapter(model: Any, steered: Steered, small_disk: Path) -> None:
    attachment = steered()
    save_adapter(model, small_disk / "pets")
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


def test_a_file_that_cannot_be_replaced_leaves_the_previous_weights(model: Any, saved: Path, steered: Steered) -> None:
    (saved / CARD).unlink()
    (saved / CARD).mkdir()
    weights = (saved / WEIGHTS).read_bytes()
    steered(rank=4)
    with pytest.raises(AdapterError, match="could not be written"):
        save_adapter(model, saved)
    assert (saved / WEIGHTS).read_bytes() == weights
    assert not list(saved.glob(".*")), "no partial files"


def test_saving_a_model_without_an_adapter_says_so(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="carries no adapter; attach"):
        save_adapter(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
