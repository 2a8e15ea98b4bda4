"""Shards (`export/streaming.py`): written and compared without a whole model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_steering_plugin.convert.torch_files import Weights
from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.export.streaming import check_shapes, compare_pieces, piece, write_pieces

MEGABYTE = 2**20


def silent(what: str, done: int, total: int) -> None:
    pass


def sharded(folder: Path, shards: int, size: int) -> Path:
    """Write a model of `shards` files of `size` bytes each, four tensors in each."""
    folder.mkdir()
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"layer.{number}.{part}" for part in range(4)]
        save_file({name: torch.full((size // 16,), float(number)) for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_shards_hold_every_tensor_once_and_an_index_names_them(tmp_path: Path) -> None:
    weights = Weights.of(sharded(tmp_path / "old", 3, 64_000))
    assert weights is not None
    (tmp_path / "new").mkdir()
    pieces = [piece(f"new.{name}", weights, name) for name in weights]
    write_pieces(tmp_path / "new", pieces, silent, 40_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) == 6 and all(file.stat().st_size < 40_000 for file in files)
    assert index["metadata"]["total_size"] == 3 * 64_000
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert compare_pieces(tmp_path / "new", pieces, silent) == 12


def test_one_bit_that_differs_is_found_and_nan_is_equal_to_itself(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    save_file({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "old" / "model.safetensors")
    weights = Weights.of(tmp_path / "old")
    assert weights is not None
    pieces = [piece("b", weights, "a")]
    write_pieces(tmp_path / "new", pieces, silent)
    assert compare_pieces(tmp_path / "new", pieces, silent) == 1
    data = bytearray((tmp_path / "new" / "model.safetensors").read_bytes())
    data[-8] ^= 1
    (tmp_path / "new" / "model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="b does not read back"):
        compare_pieces(tmp_path / "new", pieces, silent)


def test_names_and_shapes_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    weights = Weights.of(sharded(tmp_path / "old", 1, 64))
    assert weights is not None
    expected = {"layer.0.0": (5,), "layer.0.1": (4,), "other": (1,)}
    with pytest.raises(ArgumentsError) as caught:
        check_shapes([piece(name, weights, name) for name in list(weights)[:3]], expected, "it")
    for text in ("other is missing", "layer.0.2 has no place", "shape [4], and the config asks for [5]"):
        assert text in str(caught.value)


LIMITED = """
import resource, sys
from pathlib import Path
from llava_steering_plugin.convert.torch_files import Weights
from llava_steering_plugin.export.streaming import compare_pieces, piece, write_pieces
weights = Weights.of(Path(sys.argv[1]))
pieces = [piece(name, weights, name) for name in weights]
weights.close()
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = used + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[4] == "whole":
    kept = [each.tensor().clone() for each in pieces]
else:
    write_pieces(Path(sys.argv[2]), pieces, lambda *_: None, 8 * 2**20)
    assert compare_pieces(Path(sys.argv[2]), pieces, lambda *_: None) == 128
"""


@pytest.mark.parametrize("way", ["streamed", "whole"])
def test_a_model_of_256_megabytes_is_exported_within_96(tmp_path: Path, way: str) -> None:
    """The model as a whole, in one process of the same limit, shows that the limit holds."""
    source = sharded(tmp_path / "old", 32, 8 * MEGABYTE)
    (tmp_path / "new").mkdir()
    words = [str(source), str(tmp_path / "new"), str(96 * MEGABYTE), way]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True)
    assert (done.returncode == 0) == (way == "streamed"), done.stderr
