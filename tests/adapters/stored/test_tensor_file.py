"""Our reader of safetensors takes the files that the library takes, and finds the same tensors in them."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from llava_steering_plugin.adapters.stored.tensor_file import HEADER_BYTES, tensor_file

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def ours(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with tensor_file(path) as file:
        return file.metadata, {name: file.read(name) for name in file.tensors}


def of_the_library(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.equal(value.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, value in one.items()
    )


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: Any, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def test_tensors_of_every_type_and_of_no_size_come_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.rand(3, 5) * 50).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "é": torch.zeros(1, 1, 2)}
    save_file(tensors, tmp_path / "a", {"format": "pt", "note": "ü"})
    metadata, found = ours(tmp_path / "a")
    assert metadata == {"format": "pt", "note": "ü"}
    assert equal(found, tensors) and equal(found, of_the_library(tmp_path / "a")[1])


def test_of_files_with_any_bytes_changed_both_readers_take_the_same(tmp_path: Path) -> None:
    data = save({"one": torch.rand(2, 3), "two": torch.arange(4), "none": torch.zeros(0)}, {"a": "b"})
    (length,) = struct.unpack("<Q", data[:8])
    path, draw, taken = tmp_path / "a", random.Random(0), 0
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 2)):
            changed[draw.randrange(8 + length)] = draw.choice(b'0123456789,:[]{}"_ \xff\x00' + bytes(range(256)))
        path.write_bytes(changed)
        try:
            expected = of_the_library(path)[1]
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError):
            with pytest.raises((ValueError, OSError)):
                ours(path)
            continue
        taken += 1
        assert equal(ours(path)[1], expected), bytes(changed)
    assert taken > 20


HUGE = 2**63
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cut short"),
    "less than a length": (b"\1\0\0", "cut short"),
    "a header longer than the file": (struct.pack("<Q", 1000) + b"{}", "claims 1,000 bytes, and the file has 10"),
    "a header of 2^64 bytes": (b"\xff" * 8 + b"{}", f"may have {HEADER_BYTES:,}"),
    "no table": (file_of([]), "no table"),
    "no JSON": (file_of(b"{"), "Expecting"),
    "no text": (file_of(b"{\xff}"), "codec"),
    "deep": (file_of(b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"), "deep"),
    "digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "digits"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "no strings"),
    "an entry of text": (file_of({"a": "b"}), "does not hold"),
    "an unknown type": (file_of({"a": {"dtype": "F7", "shape": [], "data_offsets": [0, 0]}}), "unknown type 'F7'"),
    "a type of another type": (file_of({"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}), "unknown type"),
    "sizes of another type": (file_of({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"1"), "usable"),
    "sizes below zero": (file_of({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"1"), "usable"),
    "an overflow": (file_of({"a": {"dtype": "U8", "shape": [HUGE // 2, 4], "data_offsets": [0, 0]}}), "does not fit"),
    "an overflow beside 0": (
        file_of({"a": {"dtype": "U8", "shape": [HUGE - 1, HUGE - 1, 0], "data_offsets": [0, 0]}}),
        "does not fit",
    ),
    "many dimensions": (file_of({"a": {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]}}, b"1"), "usable"),
    "a gap": (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12"), "does not begin"),
    "bytes behind": (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12"), "end at byte"),
    "backwards": (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"1"), "does not fit its -1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_header_is_one_error_that_says_what_is_wrong(tmp_path: Path, kind: str) -> None:
    data, expected = BAD[kind]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=expected):
        ours(tmp_path / "a")
    if kind not in ("an overflow beside 0", "many dimensions"):  # the library takes sizes that are none to torch
        with pytest.raises((SafetensorError, OSError, ValueError)):
            of_the_library(tmp_path / "a")


def test_a_file_that_is_cut_short_after_it_was_opened_is_an_error_and_does_not_kill_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"a": torch.rand(100_000)}, path)
    with tensor_file(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(ValueError, match="cut short"):
            file.read("a")


def test_a_tensor_larger_than_the_memory_is_an_error(tmp_path: Path) -> None:
    size = 1 << 33
    path = tmp_path / "a"
    path.write_bytes(file_of({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
    os.truncate(path, path.stat().st_size + size)
    with tensor_file(path) as file, pytest.MonkeyPatch.context() as patch:

        def full(*sizes: Any, **options: Any) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        patch.setattr(torch, "empty", full)
        with pytest.raises(ValueError, match="no memory for a with 8,589,934,592 bytes"):
            file.read("a")
