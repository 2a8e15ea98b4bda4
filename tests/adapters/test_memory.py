"""A refusal takes no more memory than the adapter's file is large, whatever sizes the file claims.

Holds for `foreign_files.py`, `adapters/stored/tensor_file.py` and `adapters/fit/compatibility.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutated_contents import CONFIG, LLAVA, WEIGHTS, change_json, change_tensors, change_text, join, split
from pooled import save

from llava_steering_plugin import AdapterPool, load_adapter
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

SLACK = 24 << 20  # the interpreter's own arenas, and what a parser holds of a text of 1 MiB


@pytest.fixture(scope="module")
def good(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    modes = {"mores": MoReS(rank=2, tokens="all"), "mixlora": MixLoRA(factors=3, rank=2, start_layer=3)}
    return {name: save(frozen, root / name, mode) for name, mode in modes.items()}


def set_settings(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: change_json(folder, CONFIG, lambda data: data["settings"].update(settings))


def set_config(**entries: Any) -> Callable[[Path], object]:
    return lambda folder: change_json(folder, CONFIG, lambda data: data.update(entries))


def set_text(key: str, text: str) -> Callable[[Path], object]:
    return lambda folder: change_text(folder, key, lambda _: text)


def set_tensor(name: str, value: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: value}))


def claim(name: str, size: int) -> Callable[[Path], object]:
    """A tensor as large as a sparse file: all that it claims is there, and takes no place on the disk."""

    def change(folder: Path) -> None:
        header, rest = split((folder / WEIGHTS).read_bytes())
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(rest), len(rest) + size]}
        (folder / WEIGHTS).write_bytes(join(header, rest))
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + size)

    return change


def tokens_far_beyond(folder: Path) -> None:
    set_config(added_tokens={"<far>": 2**31 - 1})(folder)
    change_tensors(folder, lambda tensors: tensors.update({f"added_tokens.{part}": torch.zeros(1, 64) for part in
                                                           ("input", "output")}))  # fmt: skip


def many_tensors(folder: Path, count: int = 11_000) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header, rest = split((folder / WEIGHTS).read_bytes())
    header |= {f"adapter.{number}": entry for number in range(count)}
    (folder / WEIGHTS).write_bytes(join(header, rest))


HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "factors": ("mixlora", set_settings(factors=200_000)),
    "factors and rank": ("mixlora", set_settings(factors=2_000_000, rank=2_000_000)),
    "factors beyond all measure": ("mixlora", set_settings(factors=2**62)),
    "rank": ("mores", set_settings(rank=10**9)),
    "a list of layers": ("mores", set_settings(layers=",".join(["0"] * 400_000))),
    "layers without end": ("mores", set_settings(layers="0-999999999999")),
    "a list of targets": ("mixlora", set_settings(targets="q_proj," * 100_000)),
    "a long text": ("mores", set_settings(tokens="x" * 900_000)),
    "many settings": ("mores", set_config(settings={str(number): number for number in range(50_000)})),
    "many added tokens": ("mores", set_config(added_tokens={str(number): number for number in range(40_000)})),
    "a token far beyond": ("mores", tokens_far_beyond),
    "lists in a config": ("mores", set_text(CONFIG, "[" + "[]," * 300_000 + "1]")),
    "lists in LLaVA's config": ("mores", set_text(LLAVA, '{"a":' + "[]," * 1_000_000)),
    "a header of lists": ("mores", lambda folder: (folder / WEIGHTS).write_bytes(join(b"{" + b"[]," * 1_300_000, b""))),
    "a header of its own size": (
        "mores", lambda folder: (folder / WEIGHTS).write_bytes(join(b'{"a":"' + b"x" * (9 << 20) + b'"}', b"")),
    ),
    "many tensors": ("mores", many_tensors),
    "too many tensors": ("mores", lambda folder: many_tensors(folder, 30_000)),
    "rows of no columns": ("mores", set_tensor("fingerprint.rows", torch.zeros(10**9, 0))),
    "a large tensor for the mode": ("mores", claim("adapter.layers.0.vis.more", 8 << 30)),
    "a large tensor for the base": ("mores", claim("base.lm_head.more", 8 << 30)),
    "a large tensor of no kind": ("mores", claim("more", 8 << 30)),
    "a file without end": ("mores", lambda folder: os.truncate(folder / WEIGHTS, 1 << 42)),
}  # fmt: skip


def growth(action: Callable[[], object]) -> int:
    """Run a refusal in a child; return by how many bytes its memory grew."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "no refusal"
        try:
            before = peak()
            try:
                action()
            except AdapterError:
                said = str(peak() - before)
        except BaseException:  # noqa: BLE001
            said = traceback.format_exc()
        finally:
            os.write(writing, said.encode()[-4000:])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    assert said.isdecimal(), said
    return int(said)


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_refusal_takes_no_more_memory_than_the_file(
    frozen: Any, good: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    name, change = HOSTILE[kind]
    folder = Path(shutil.copytree(good[name], tmp_path / "pets"))
    change(folder)
    on_disk = (folder / WEIGHTS).stat().st_blocks * 512
    for load in (lambda: load_adapter(frozen, folder), lambda: AdapterPool(frozen).load("pets", folder)):
        assert growth(load) <= on_disk + SLACK
