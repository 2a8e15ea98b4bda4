"""Seeded changes of adapter folders, of the kinds that damage, hands and strangers make.

`mutate(source, folder, seed, number)` does the same for the same numbers. What weights hold: `mutated_contents.py`.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import mutated_contents as contents
from mutated_contents import COPY, LLAVA, LLAVA_COPY, WEIGHTS, Draw, join, some_bytes, split

FILES = (WEIGHTS, COPY, LLAVA_COPY)


# Bytes


def header_bytes(draw: Draw, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    (folder / WEIGHTS).write_bytes(some_bytes(draw, data, 0, 8 + length))


def tensor_bytes(draw: Draw, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    (folder / WEIGHTS).write_bytes(some_bytes(draw, data, 8 + length, len(data)))


def bytes_of_copies(draw: Draw, folder: Path) -> None:
    for name in (COPY, LLAVA_COPY):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(some_bytes(draw, data, 0, len(data)))
    if draw.random() < 0.5:
        (folder / WEIGHTS).unlink()


def sizes(draw: Draw, folder: Path) -> None:
    path = folder / draw.choices(FILES, (4, 1, 1))[0]
    data = path.read_bytes()
    kind = draw.randrange(6)
    if kind == 0:
        os.truncate(path, draw.randrange(len(data)))
    elif kind == 1:
        path.write_bytes(data + draw.randbytes(draw.randint(1, 5000)))
    elif kind == 2:
        os.truncate(path, draw.choice((2**21, 2**33, 2**40)))  # takes no block of the disk
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4:
        length = draw.choice((0, 1, 2, len(data), len(data) - 8, 2**22, 2**31, 2**32, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + data[8:])
    else:  # a tensor as large as a sparse file
        header, rest = split((folder / WEIGHTS).read_bytes())
        size = draw.choice((2**31, 2**33, 2**40))
        name = draw.choice(("adapter.layers.0.vis.steer_basis", "base.model.embed_tokens.weight", "fingerprint.more"))
        header.pop(name, None)
        header["adapter.more"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(rest), len(rest) + size]}
        (folder / WEIGHTS).write_bytes(join(header, rest))
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + size)


# Files


def _replaced(draw: Draw, folder: Path) -> Path:
    path = folder / draw.choices(FILES, (3, 2, 2))[0]
    path.unlink()
    if path.name == LLAVA_COPY:  # which is read where the header does not hold it
        header, rest = split((folder / WEIGHTS).read_bytes())
        header["__metadata__"].pop(LLAVA)
        (folder / WEIGHTS).write_bytes(join(header, rest))
    return path


def file_kinds(draw: Draw, folder: Path) -> None:
    kind = draw.choice(("pipe", "socket", "folder", "full folder", "nothing", "closed"))
    if kind == "closed":
        (folder / draw.choice(FILES)).chmod(0)
        return
    path = _replaced(draw, folder)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.path.relpath(path))  # a socket's path is short
    elif kind.endswith("folder"):
        path.mkdir()
        if kind == "full folder":
            (path / WEIGHTS).write_bytes(b"")


def links(draw: Draw, folder: Path) -> None:
    aside = folder.with_name(folder.name + ".aside")
    shutil.copytree(folder, aside)
    path = _replaced(draw, folder)
    (aside / "pipe").unlink(missing_ok=True)
    os.mkfifo(aside / "pipe")
    device = ("/dev/zero", "/dev/null", "/dev/full", "/dev/tty", "/proc/self/mem", "/proc/kmsg", "/proc/self/fd/0",
              "/proc/self/environ", "/proc/kcore", "/sys/kernel/debug/tracing/trace_pipe")  # fmt: skip
    target = draw.choice(
        (aside / path.name, aside / path.name, aside / "pipe", aside, aside / "missing", path, *device)
    )
    if draw.random() < 0.1:
        os.link(aside / path.name, path)
    else:
        path.symlink_to(target)


KINDS: dict[str, Callable[[Draw, Path], None]] = {
    "bytes of the header": header_bytes,
    "bytes of tensors": tensor_bytes,
    "bytes of the copies": bytes_of_copies,
    "sizes of files": sizes,
    "JSON values": contents.values,
    "JSON types": contents.types,
    "JSON keys": contents.keys,
    "JSON texts": contents.texts,
    "LLaVA's config": contents.llava_settings,
    "settings of the mode": contents.settings,
    "names of tensors": contents.names_of_tensors,
    "shapes of tensors": contents.shapes,
    "types of tensors": contents.dtypes,
    "values of tensors": contents.values_of_tensors,
    "kinds of files": file_kinds,
    "links": links,
}


def kind_of(number: int) -> str:
    return list(KINDS)[number % len(KINDS)]


def mutate(source: Path, folder: Path, seed: int, number: int) -> None:
    """Make a changed copy of `source` at `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(folder.name + ".aside"), ignore_errors=True)
    shutil.copytree(source, folder)
    KINDS[kind_of(number)](Draw(f"{seed}/{number}"), folder)
