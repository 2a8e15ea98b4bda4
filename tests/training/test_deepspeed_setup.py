"""What happens before DeepSpeed starts: abandoned locks are removed, and a quantised model is left in place.

Covers `training/deepspeed.py` with test_deepspeed.py, which trains on two ranks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from torch import nn

from llava_steering_plugin.training.deepspeed import COMPILING_SECONDS, fix_preparation, remove_abandoned_locks

ON_LINUX = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells what a process has open")


@pytest.fixture(params=["own folder", "behind a link", "default folder"])
def operations(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that holds one folder for each operation."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if request.param == "own folder":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        return tmp_path
    if request.param == "behind a link":
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "link"))
        return tmp_path / "link"
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    return tmp_path / "py311_cpu"


def locked(operations: Path, seconds: float) -> Path:
    """Make the lock of an operation, that many seconds old."""
    lock = operations / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - seconds,) * 2)
    return lock


def test_a_lock_that_nobody_holds_and_that_is_old_is_removed(
    operations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = locked(operations, COMPILING_SECONDS + 10)
    with caplog.at_level(logging.WARNING):
        remove_abandoned_locks()
    assert not lock.exists()
    assert f"removed the lock {lock}" in caplog.text


@pytest.mark.parametrize(
    "ending", ["it gets old", "its owner has ended", pytest.param("a process here takes it", marks=ON_LINUX)]
)
def test_a_young_lock_that_nobody_here_holds_is_waited_for_and_reported(
    operations: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    lock = locked(operations, COMPILING_SECONDS - 30)
    slept: list[float] = []
    held: list[IO[bytes]] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) < 3:
            return
        if ending == "it gets old":
            os.utime(lock, (time.time() - COMPILING_SECONDS,) * 2)
        elif ending == "its owner has ended":
            lock.unlink()
        else:
            held.append(lock.open("rb"))

    monkeypatch.setattr(time, "sleep", sleep)
    with caplog.at_level(logging.WARNING):
        remove_abandoned_locks()
    assert len(slept) == 3 and lock.exists() == bool(held)
    for file in held:
        file.close()
    assert caplog.text.count(f"DeepSpeed would wait for the lock {lock}") == 1
    assert "Waiting up to 30 s for its release" in caplog.text


@ON_LINUX
def test_a_lock_that_a_process_holds_stays_however_old_it_is(
    operations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = locked(operations, 10 * COMPILING_SECONDS)
    with lock.open(), caplog.at_level(logging.WARNING):
        remove_abandoned_locks()
    assert lock.exists()
    assert not caplog.text


@ON_LINUX
def test_an_old_lock_is_removed_also_while_other_processes_end(
    operations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = locked(operations, COMPILING_SECONDS + 10)
    gone = f"/proc/{os.getppid()}/fd"

    def ending(look: Callable[..., Any]) -> Callable[..., Any]:
        def looked(path: Any = ".") -> Any:
            if os.fspath(path) == gone:
                raise FileNotFoundError(gone)
            return look(path)

        return looked

    monkeypatch.setattr(os, "scandir", ending(os.scandir))
    monkeypatch.setattr(os, "listdir", ending(os.listdir))
    remove_abandoned_locks()
    assert not lock.exists()


def test_a_lock_of_another_user_is_reported_with_what_to_do(
    operations: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = locked(operations, COMPILING_SECONDS + 10)

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"not yours: {path}")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "unlink", refused)
        remove_abandoned_locks()
    assert f"DeepSpeed will wait for the lock {lock}" in caplog.text
    assert "not yours" in caplog.text and "TORCH_EXTENSIONS_DIR" in caplog.text


class Packed(nn.Module):
    """Refuses to be moved and cast, as transformers' models over bitsandbytes do."""

    is_quantized = True

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        raise ValueError("`.to` is not supported")

    def half(self) -> Packed:
        raise ValueError("`.half` is not supported")


class Accelerator:
    """Moves and casts what it prepares, as DeepSpeed's engines do, the newer and the older ones."""

    def prepare(self, *parts: nn.Module) -> nn.Module:
        for part in parts:
            part.half().to("cpu")
        return parts[0]


def test_a_quantised_model_stays_where_it_is_while_an_engine_is_made_of_it_and_only_then() -> None:
    accelerator, model = Accelerator(), Packed()
    fix_preparation(accelerator)
    assert accelerator.prepare(model) is model
    with pytest.raises(ValueError, match="not supported"):
        model.to("cpu")
    with pytest.raises(ValueError, match="not supported"):
        model.half()
