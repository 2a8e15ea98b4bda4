"""Writes a model's tensors shard by shard, and compares them bit by bit: no more than one shard is held in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_steering_plugin.convert.torch_files import Weights
from llava_steering_plugin.errors import AdapterError, ArgumentsError, listing, shortened

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"

# Is told what is done, how many tensors of it are, and of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """A tensor that is written: where it comes from, and what is made of it.

    Attributes:
        target: its name in the new model.
        source: files it is read from; None: it is made.
        name: its name there.
        change: makes the new tensor of the old one, or of nothing; None: it stays as it is.
        shape: in the new model.
        size: in bytes.
    """

    target: str
    source: Weights | None
    name: str
    change: Callable[[Tensor], Tensor] | None
    shape: tuple[int, ...]
    size: int

    def tensor(self) -> Tensor:
        """Return the tensor as it is written."""
        old = torch.empty(0) if self.source is None else self.source[self.name]
        return old.contiguous() if self.change is None else self.change(old).contiguous()

    @property
    def place(self) -> tuple[str, str]:
        """The file that it is read from, and its name: in this order a file is opened once."""
        return ("", self.target) if self.source is None else (str(self.source.file_of(self.name)), self.name)


def piece(
    target: str,
    source: Weights,
    name: str,
    change: Callable[[Tensor], Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Piece:
    """Return the piece for a tensor in a file; `shape` is that of the new tensor where `change` gives it another."""
    tensor = source[name]
    new = tuple(tensor.shape) if shape is None else shape
    return Piece(target, source, name, change, new, torch.Size(new).numel() * tensor.element_size())


def check_shapes(pieces: Iterable[Piece], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compare names and shapes with those that a model of the new config has.

    Raises:
        ArgumentsError: some are missing, left over, or of another shape.
    """
    shapes = {each.target: each.shape for each in pieces}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - shapes.keys())]
    problems += [f"{name} has no place there" for name in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(shapes[name])}, and the config asks for {list(expected[name])}"
        for name in sorted(shapes.keys() & expected.keys())
        if shapes[name] != expected[name]
    ]
    if problems:
        raise ArgumentsError(listing(f"the weights of {what} do not fit its config", shortened(problems)))


def write_pieces(
    folder: Path, pieces: Sequence[Piece], progress: Progress, shard: int = SHARD_BYTES, what: str = "writing"
) -> None:
    """Write safetensors of at most `shard` bytes (or of one tensor) into `folder`, with an index if there are several.

    Raises:
        OSError: the disk refuses them.
        AdapterError: a file of the source is damaged.
    """
    shards = _shards(pieces, shard)
    where: dict[str, str] = {}
    done = 0
    for number, members in enumerate(shards, 1):
        many = len(shards) > 1
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        tensors = {}
        for each in members:
            tensors[each.target] = each.tensor()
            done += 1
            progress(what, done, len(pieces))
        # Some of the tensors may lie in the same memory, such as a part of another: each is written whole.
        save_file({name: _own(tensor) for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, _mode())  # safetensors lets its owner alone read it
        where |= dict.fromkeys(tensors, file)
        del tensors
        _close(members)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(each.size for each in pieces)},
            "weight_map": dict(sorted(where.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def compare_pieces(folder: Path, pieces: Sequence[Piece], progress: Progress, what: str = "comparing") -> int:
    """Read back what was written, and compare every bit with what it was made of; return the number of tensors.

    Raises:
        AdapterError: it differs.
    """
    written = Weights.of(folder)
    if written is None or set(written) != {each.target for each in pieces}:
        raise AdapterError(f"{folder} does not hold the tensors that were written to it. Is the disk sound?")
    last = ""
    for done, each in enumerate(sorted(pieces, key=lambda one: one.place), 1):
        if last != each.place[0]:
            _close(pieces)
            written.close()
            last = each.place[0]
        if not _same_bits(written[each.target], each.tensor()):
            raise AdapterError(f"{each.target} does not read back as it was written. Is the disk sound?")
        progress(what, done, len(pieces))
    written.close()
    _close(pieces)
    return len(pieces)


def _shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = []
    size = limit
    for each in sorted(pieces, key=lambda one: one.place):
        if not shards or size + each.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.size
    return shards


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor with memory of its own, where it lies in that of others: safetensors refuses shared memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _mode() -> int:
    """Return the rights that a new file gets."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN is not equal to itself.
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _close(pieces: Iterable[Piece]) -> None:
    for weights in {id(each.source): each.source for each in pieces if each.source is not None}.values():
        weights.close()
