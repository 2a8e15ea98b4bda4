"""Labels as text, and the official files of labels: `evaluation/scores/labels.py`."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from benchmark_folders import make

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Pair, Wanted
from llava_steering_plugin.evaluation.scores.labels import (
    digit_metrics,
    label_of,
    read_cifar10,
    read_mnist,
    statement_metrics,
)


@pytest.mark.parametrize(
    ("text", "label"),
    [(" Aquarium_Fish.", "aquarium fish"), ("'bird'", "bird"), ("a  b\n", "a b"), ("", "")],
)
def test_a_label_is_compared_without_case_and_punctuation_at_its_ends(text: str, label: str) -> None:
    assert label_of(text) == label


def test_yes_is_true_and_number_words_are_digits() -> None:
    statements = [Pair("0", "true", "Yes, it is."), Pair("1", "true", "True"), Pair("2", "false", "perhaps")]
    assert statement_metrics(statements)["true"]["accuracy"] == 100
    assert statement_metrics(statements)["false"]["accuracy"] == 0
    assert digit_metrics([Pair("0", "7", "Seven."), Pair("1", "7", "The 7")])["7"]["accuracy"] == 50


def test_mnists_labels_may_be_packed_and_are_refused_if_they_end_early(tmp_path: Path) -> None:
    plain = make("mnist", tmp_path / "official").annotations
    packed = tmp_path / "t10k-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_mnist(tmp_path, Wanted()).items == read_mnist(plain, Wanted()).items == {"0": "7", "1": "2", "2": "1"}
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-9])
    plain.write_bytes(plain.read_bytes()[:-1])
    for file in (packed, plain):
        with pytest.raises(DataError, match="ends too early"):
            read_mnist(file, Wanted())


def test_a_label_without_a_name_is_told(tmp_path: Path) -> None:
    folder = make("cifar10", tmp_path / "official").annotations
    (folder / "test_batch.bin").write_bytes(bytes((9,)) + bytes(3072))
    with pytest.raises(DataError, match=r"test_batch\.bin is in another layout"):
        read_cifar10(folder, Wanted())
    (folder / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match="its 3,072 bytes are no records of 3,073"):
        read_cifar10(folder, Wanted())
