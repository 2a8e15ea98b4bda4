"""Reads safetensors files that strangers wrote: the header is checked whole, and tensors are read when asked for.

The format: 8 bytes with the length N of the header, little-endian; N bytes of JSON, {name: {"dtype", "shape",
"data_offsets": [begin, end]}} and, under "__metadata__", strings by strings; then the tensors without gaps.

The safetensors library opens files by name, which waits for ever at a named pipe, and maps them into memory: where
another program cuts a mapped file short, reading it kills the process. It reads what this module does not refuse, and
to the same tensors (tests/adapters/stored/test_tensor_file.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from llava_steering_plugin.foreign_files import MIB, WEIGHT_BYTES, brief, opened, parse_json

if TYPE_CHECKING:
    from torch import Tensor

# One entry of a header takes about 130 bytes; a MixLoRA for 70B has 2,800.
HEADER_BYTES = 4 * MIB
HEADER_VALUES = 100_000  # 12,000 tensors, whose entries take a kilobyte each once they are read
METADATA = "__metadata__"
# The format's types: their names in torch, and the bytes of one number.
_TYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
_LARGEST = 2**63 - 1
_DIMENSIONS = 64  # torch takes no more


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in its file.

    Attributes:
        dtype: its name in torch.
        begin, end: counted from the first byte of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, open.

    Attributes:
        metadata: the strings in its header.
        tensors: the places of its tensors, by name.

    Raises:
        ValueError: it is no safetensors file, damaged or cut short.
        OSError: it cannot be read.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"its header claims {length:,} bytes, and may have {HEADER_BYTES:,}")
        if length > size - 8:
            raise ValueError(f"its header claims {length:,} bytes, and the file has {size:,}")
        text = self._bytes(8, length).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("its header is no table")
        header = parse_json(text, HEADER_VALUES)
        self.metadata: dict[str, str] = _strings(header.pop(METADATA, None))
        self.tensors = _places(header, 8 + length, size)

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory.

        Raises:
            ValueError: the file has been cut short in the meantime, or there is no memory for it.
            OSError: it cannot be read.
        """
        import torch

        place = self.tensors[name]
        try:
            tensor = torch.empty(place.shape, dtype=getattr(torch, place.dtype), device="cpu")
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"there is no memory for {name} with {place.end - place.begin:,} bytes") from error
        if tensor.numel():
            self._fill(tensor.reshape(-1).view(torch.uint8).numpy().data, place.begin)
        return tensor

    def _bytes(self, begin: int, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data), begin)
        return bytes(data)

    def _fill(self, view: memoryview, begin: int) -> None:
        self._file.seek(begin)
        while len(view):
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it is cut short")
            view = view[count:]


@contextmanager
def tensor_file(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Open the weights of an adapter.

    Raises:
        OSError, ValueError: as `files.opened` and `TensorFile`.
    """
    with opened(path, WEIGHT_BYTES) as file:
        yield TensorFile(file)


def _strings(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"the {METADATA} of its header are no strings")
    return metadata


def _places(header: Mapping[str, Any], begin: int, size: int) -> dict[str, StoredTensor]:
    """Check the entries of a header; together they must fill the file from `begin` to `size` without gaps."""
    places = {name: _place(name, entry, begin) for name, entry in header.items()}
    end = begin
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise ValueError(f"{brief(name)} does not begin where the tensor before it ends")
        end = place.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, and the file at {size:,}")
    return places


def _place(name: str, entry: Any, begin: int) -> StoredTensor:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ValueError(f"the entry of {brief(name)} in its header does not hold {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ValueError(f"{brief(name)} is of the unknown type {brief(dtype)}")
    if not _numbers(shape) or len(shape) > _DIMENSIONS or not _numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{brief(name)} has no usable shape or place: {brief(shape)}, {brief(offsets)}")
    kind, width = _TYPES[dtype]
    # torch multiplies the sizes that are not 0, too, and may not exceed 63 bits there.
    if prod(count or 1 for count in shape) * width > _LARGEST or prod(shape) * width != offsets[1] - offsets[0]:
        raise ValueError(f"{brief(name)} of the shape {brief(shape)} does not fit its {offsets[1] - offsets[0]} bytes")
    return StoredTensor(kind, tuple(shape), begin + offsets[0], begin + offsets[1])


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _LARGEST for value in values)
