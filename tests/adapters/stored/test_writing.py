"""A save that is killed or refused leaves the adapter that was there before or the new one, and never a mixture."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import as_version_0_1
from killed_saves import KILL_INSIDE, KilledSaves, contents_of, write
from steered import strengthen

from llava_steering_plugin import attach, save_adapter
from llava_steering_plugin.adapters.stored.folder import CARD, CONFIG, LLAVA_CONFIG, OLD_CONFIG, WEIGHTS
from llava_steering_plugin.adapters.stored.locate import find, read
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

OLD, NEW, NEXT, LARGE = 1, 2, 3, 10_000
COPIES = (CONFIG, LLAVA_CONFIG, CARD)  # in the order in which they are written
FILES = {WEIGHTS, *COPIES}


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledSaves]:
    template = KilledSaves(tmp_path_factory.mktemp("killed"))
    yield template
    template.close()


@pytest.fixture
def pets() -> Iterator[Path]:
    """The folder to save to; in memory where that can be had, because a save flushes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "pets"


@pytest.fixture(params=["a fresh folder", "an adapter", "an adapter of version 0.1"])
def before(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """The folder as it is before the save; None: there is none."""
    if request.param == "a fresh folder":
        return None
    write(tmp_path / "before", OLD)
    return as_version_0_1(tmp_path / "before") if request.param.endswith("0.1") else tmp_path / "before"


def start_from(before: Path | None, folder: Path) -> Path:
    """Make `folder` what the save finds."""
    shutil.rmtree(folder, ignore_errors=True)
    if before is not None:
        shutil.copytree(before, folder)
    return folder


def held(folder: Path) -> int | None:
    """Return the number of the one adapter in `folder`, of which everything must be; None if there is none."""
    found = find(folder)
    if found is None:
        with pytest.raises(AdapterError):
            read(folder)
        return None
    stored = found.read()
    number = stored.config.settings["rank"]
    config, tensors, llava = contents_of(number)
    assert stored.config == config
    assert stored.tensors.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in stored.tensors.items())
    assert found.config == config
    assert found.llava_config == stored.folder.llava_config == llava
    return int(number)


def check_next_save(folder: Path) -> None:
    """Save once more: everything is replaced, and nothing of the killed save is left."""
    write(folder, NEXT)
    assert held(folder) == NEXT
    assert set(os.listdir(folder)) == FILES
    config, _, _ = contents_of(NEXT)
    assert (folder / CONFIG).read_text() == config.to_json() + "\n"
    assert (folder / CARD).read_text() == f"The card of {NEXT}\n"


def test_a_save_that_is_killed_between_any_two_calls_leaves_the_old_adapter_or_the_new_one(
    saves: KilledSaves, before: Path | None, pets: Path
) -> None:
    status, moments = saves.save(start_from(before, pets), NEW)
    assert (status, held(pets)) == (0, NEW)
    assert set(os.listdir(pets)) == FILES
    found = []
    for moment in range(len(moments)):
        folder = start_from(before, pets)
        assert saves.save(folder, NEW, die_at=moment)[0] == -signal.SIGKILL
        found.append(held(folder))
        check_next_save(folder)
    # One call decides, the rename of the weights. Moments come in pairs: before the call and after it.
    after = moments.index("replace") + 1
    assert found == [None if before is None else OLD] * after + [NEW] * (len(moments) - after)
    assert {"mkdir", "serialize_file", "open", "write", "fsync", "rmdir"} <= set(moments)
    assert moments.count("replace") == 2 * len(FILES)
    assert ("unlink" in moments) == (before is not None and (before / OLD_CONFIG).exists())


def test_a_save_that_is_killed_inside_the_write_of_a_copy_leaves_the_old_adapter(
    saves: KilledSaves, before: Path | None, pets: Path
) -> None:
    _, moments = saves.save(start_from(before, pets), NEW)
    cut: dict[str, set[int]] = {}
    for moment in (at for at, name in enumerate(moments) if name == "write"):
        for size in (0, 1, 10):
            folder = start_from(before, pets)
            assert saves.save(folder, NEW, full_at=moment, size=size)[0] == -signal.SIGXFSZ
            assert held(folder) == (None if before is None else OLD)
            [staging] = folder.glob(".*.partial")
            last = [name for name in COPIES if (staging / name).exists()][-1]
            cut.setdefault(last, set()).add((staging / last).stat().st_size)
            check_next_save(folder)
    assert cut == {name: {0, 1, 10} for name in COPIES}


def test_a_save_that_is_killed_inside_the_write_of_the_weights_leaves_the_old_adapter(
    saves: KilledSaves, before: Path | None, pets: Path
) -> None:
    folder = start_from(before, pets)
    assert saves.save(folder, LARGE, die_at=KILL_INSIDE)[0] == -signal.SIGKILL
    assert held(folder) == (None if before is None else OLD)
    [staging] = folder.glob(".*.partial")
    [weights] = staging.iterdir()
    assert 0 < weights.stat().st_blocks * 512 < 4 * LARGE * 256 * 4, "a part of the data"
    check_next_save(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", [MoReS(), MixLoRA(factors=2, rank=1)], ids=["mores", "mixlora"])
def test_a_diverged_adapter_is_not_written_and_the_one_before_stays(
    model: Any, tmp_path: Path, mode: Any, value: float
) -> None:
    attachment = strengthen(attach(model, mode))
    save_adapter(model, tmp_path / "it")
    before = {file.name: file.read_bytes() for file in (tmp_path / "it").iterdir()}
    name, parameter = next(iter(attachment.parameters().items()))
    with torch.no_grad():
        parameter.view(-1)[1] = value
    message = f"the training has diverged.*\n  - {re.escape(f'adapter.{name}')}: 1 of"
    with pytest.raises(AdapterError, match=message):
        save_adapter(model, tmp_path / "it")
    assert {file.name: file.read_bytes() for file in (tmp_path / "it").iterdir()} == before
    with pytest.raises(AdapterError, match=message):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
