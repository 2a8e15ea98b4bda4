"""Converting a checkpoint runs nothing that is in it, whatever kind of pickle it is (`convert/torch_files.py`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from released_checkpoints import (
    METHODS,
    golden_base,
    layer_file,
    refusal,
)


class CreatesFile:
    """Unpickled by ordinary means, creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("forced", [False, True], ids=["", "torch told to load unsafely"])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("mores", "mores/language_model/intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin"),
        ("mores", "language_model/pytorch_model.bin"),
        ("mores", "connector/pytorch_model.bin"),
        ("mixlora", "cmoa_args.bin"),
        ("mixlora", "pytorch_model.bin"),
    ],
)
def test_a_malicious_pickle_is_refused_and_does_nothing(
    released: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    file: str,
    modern: bool,
    forced: bool,
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, made = released(method), tmp_path / "made"
    (folder / file).parent.mkdir(exist_ok=True)
    content: Any = {"weight": torch.zeros(2), "bias": CreatesFile(made)}
    if file == "cmoa_args.bin":
        content = SimpleNamespace(**content)
    torch.save(content, folder / file, _use_new_zipfile_serialization=modern)
    message = refusal(folder, golden_base(method))
    assert "posix.mkdir" in message and Path(file).name in message and "\n" not in message
    assert not made.exists()
    torch.load(folder / file, weights_only=False)
    assert made.exists(), "the pickle is harmless, so the test shows nothing"


def test_a_malicious_base_is_refused_and_does_nothing(released: Callable[[str], Path], tmp_path: Path) -> None:
    base, made = tmp_path / "base", tmp_path / "made"
    base.mkdir()
    shutil.copy(Path(golden_base("mores")) / "config.json", base)
    torch.save({"model.embed_tokens.weight": CreatesFile(made)}, base / "pytorch_model.bin")
    assert "posix.mkdir" in refusal(released("mores"), str(base))
    assert not made.exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_namespace_is_allowed_where_the_arguments_are_and_nowhere_else(
    released: Callable[[str], Path], method: str
) -> None:
    folder = released(method)
    path = layer_file(folder, 0) if method == "mores" else folder / "pytorch_model.bin"
    torch.save(SimpleNamespace(weight=torch.zeros(2)), path)
    assert "types.SimpleNamespace" in refusal(folder, golden_base(method))


def test_a_torch_that_cannot_open_pickles_safely_opens_none(
    released: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    assert "torch 2.6 or newer" in refusal(released("mixlora"), golden_base("mixlora"))
