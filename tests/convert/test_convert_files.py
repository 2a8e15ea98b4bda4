"""Checkpoints with pipes, devices, bombs or files without end in them are refused (`convert/torch_files.py`)."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from released_checkpoints import golden, golden_base

from llava_steering_plugin.convert.conversion import convert
from llava_steering_plugin.convert.torch_files import tensors_in
from llava_steering_plugin.errors import AdapterError

FILES = {
    method: sorted(str(file.relative_to(golden(method))) for file in golden(method).rglob("*") if file.is_file())
    for method in ("mores", "mixlora")
}


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def no_end(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


@pytest.mark.parametrize("make", [a_pipe, a_device, no_end])
@pytest.mark.parametrize("method", FILES)
def test_no_file_of_a_checkpoint_is_waited_for_or_read_without_end(
    released: Callable[[str], Path], tmp_path: Path, method: str, make: Callable[[Path], None]
) -> None:
    assert len(FILES[method]) >= 3
    folder = released(method)
    for name in FILES[method]:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        make(folder / name)
        try:
            convert(folder, tmp_path / "new", golden_base(method), force=True)
        except AdapterError as error:
            assert Path(name).name in str(error) or "no files" in str(error) or "missing" in str(error)
        else:
            assert Path(name).name == "config.json", "a file that is left out where it is none"
        (folder / name).unlink()
        (folder / name).write_bytes(whole)
    convert(folder, tmp_path / "new", golden_base(method), force=True)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1_000_000)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "a.bin", "w") as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.bin").stat().st_size < 100_000
    with pytest.raises(AdapterError, match=r"a\.bin cannot be read"):
        tensors_in(tmp_path / "a.bin")


def test_a_tensor_that_repeats_a_few_numbers_may_not_claim_to_be_larger(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**9)}, tmp_path / "a.bin")
    with pytest.raises(AdapterError, match="larger than what is stored of them: weight"):
        tensors_in(tmp_path / "a.bin")
