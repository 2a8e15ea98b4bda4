"""Pictures of CIFAR and MNIST come out of their binary files as they are in them: `evaluation/layouts/bitmaps.py`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from official_sources import make_source
from PIL import Image

from llava_steering_plugin.errors import ArgumentsError, DataError
from llava_steering_plugin.evaluation.preparing import prepare


def test_cifars_bytes_are_red_then_green_then_blue(tmp_path: Path) -> None:
    source = make_source("cifar10", tmp_path / "official")
    made = prepare("cifar10", source, tmp_path / "data", split="test")
    assert made.samples is not None
    first = json.loads(made.samples.read_text())[0]
    with Image.open(tmp_path / "data" / "images" / first["image"]) as file:
        assert (file.size, file.mode, set(file.getdata())) == ((32, 32), "RGB", {(200, 0, 0)})
    assert first["conversations"][1]["value"] == "bird"
    assert prepare("cifar10", source, tmp_path / "data").entries == 10  # five batches of two


def test_mnists_digits_may_be_packed_and_must_be_as_many_as_their_labels(tmp_path: Path) -> None:
    source = make_source("mnist", tmp_path / "official")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (source / f"{name}.gz").write_bytes(gzip.compress((source / name).read_bytes()))
        (source / name).unlink()
    made = prepare("mnist", source, tmp_path / "data")
    assert made.entries == 2
    with Image.open(tmp_path / "data" / "images" / "mnist" / "train" / "1.png") as file:
        assert (file.size, set(file.getdata())) == ((28, 28), {255})
    images = source / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match="does not hold the 2 images of t10k-labels-idx1-ubyte"):
        prepare("mnist", source, tmp_path / "data", split="test")


def test_a_link_in_the_place_of_the_pictures_is_not_written_through(tmp_path: Path) -> None:
    source = make_source("cifar10", tmp_path / "official")
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "cifar10").symlink_to(source)
    with pytest.raises(ArgumentsError, match="is a link, and should be a folder"):
        prepare("cifar10", source, tmp_path / "data")
    (source / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match="its 3,072 bytes are no records of 3,073"):
        prepare("cifar10", source, tmp_path / "other", split="test")
