"""Benchmarks whose answer is one of a few labels: VSR, SNLI-VE, CIFAR-10, CIFAR-100 and MNIST.

None has an official rule for text: theirs is the accuracy of a classifier. Here an answer is right if its label, in
lower case and without punctuation at its ends, is the right one. Sources: VSR (arXiv 2205.00363,
github.com/cambridgeltl/visual-spatial-reasoning), SNLI-VE (arXiv 1901.06706, github.com/necla-ml/SNLI-VE), CIFAR
(cs.toronto.edu/~kriz/cifar.html, the binary version), MNIST (yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_steering_plugin.evaluation.benchmark import Metrics, Pair, Points, References, Wanted, accuracies
from llava_steering_plugin.evaluation.official_files import keyed, official, read_lines, reading, text_of
from llava_steering_plugin.evaluation.scores.vqa_text import NUMBERS

_SAME = {"yes": "true", "no": "false"}
_PIXELS = 3 * 32 * 32
_IDX_LABELS = bytes((0, 0, 8, 1))  # of unsigned bytes, in one dimension


def label_of(text: str) -> str:
    """Return an answer as a label: lower case, spaces for underscores, no punctuation at its ends."""
    return " ".join(text.replace("_", " ").lower().strip(string.punctuation + string.whitespace).split())


def label_points(pairs: Sequence[Pair]) -> Points:
    """Tell which answers are the right label."""
    return {pair.key: float(label_of(pair.text) == pair.reference) for pair in pairs}


def label_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions, and of each label."""
    return _by_label(label_points(pairs), pairs)


def statement_points(pairs: Sequence[Pair]) -> Points:
    """Tell which statements are judged right; yes is true, and no is false."""
    said = {pair.key: label_of(label_of(pair.text).split(" ")[0]) for pair in pairs}
    return {pair.key: float(_SAME.get(said[pair.key], said[pair.key]) == pair.reference) for pair in pairs}


def statement_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all statements, and of true and false ones; yes is true, and no is false."""
    return _by_label(statement_points(pairs), pairs)


def digit_points(pairs: Sequence[Pair]) -> Points:
    """Tell which digits are right; a number word is its digit."""
    said = {pair.key: label_of(pair.text) for pair in pairs}
    return {pair.key: float(NUMBERS.get(said[pair.key], said[pair.key]) == pair.reference) for pair in pairs}


def digit_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all digits, and of each; a number word is its digit."""
    return _by_label(digit_points(pairs), pairs)


def _by_label(points: Points, pairs: Sequence[Pair]) -> Metrics:
    return accuracies(points, {pair.key: pair.reference for pair in pairs})


def read_vsr(source: Path, wanted: Wanted) -> References:
    """Read VSR's statements, one a line; the number of the line, from 0, is the id.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "splits/random/test.jsonl", "test.jsonl")
    lines = read_lines(path)
    with reading(path):
        if wrong := [line["label"] for line in lines if line["label"] not in (0, 1)]:
            raise ValueError(f"its label {wrong[0]!r} is neither 0 nor 1")
        return References(keyed(path, ((n, "true" if line["label"] else "false") for n, line in enumerate(lines))))


def read_snli_ve(source: Path, wanted: Wanted) -> References:
    """Read SNLI-VE's pairs, one a line; `pairID` is the id.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "snli_ve_test.jsonl")
    lines = read_lines(path)
    with reading(path):
        return References(keyed(path, ((line["pairID"], text_of(line, "gold_label")) for line in lines)))


def read_cifar10(source: Path, wanted: Wanted) -> References:
    """Read the labels of CIFAR-10's test batch in the binary version; the place of the image, from 0, is the id.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    path = official(source, "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    return _labels(path, _cifar(path, 1), _names(path.with_name("batches.meta.txt")))


def read_cifar100(source: Path, wanted: Wanted) -> References:
    """Read the fine labels of CIFAR-100's test batch in the binary version; the place of the image is the id.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    path = official(source, "test.bin", "cifar-100-binary/test.bin")
    return _labels(path, _cifar(path, 2), _names(path.with_name("fine_label_names.txt")))


def read_mnist(source: Path, wanted: Wanted) -> References:
    """Read the labels of MNIST's test images, in IDX, packed or not; the place of the image, from 0, is the id.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "t10k-labels-idx1-ubyte", "t10k-labels-idx1-ubyte.gz", "t10k-labels.idx1-ubyte")
    with reading(path):
        held = path.read_bytes()
        try:
            held = gzip.decompress(held) if path.suffix == ".gz" else held
        except EOFError as error:
            raise ValueError("it ends too early") from error
        if held[:4] != _IDX_LABELS or int.from_bytes(held[4:8], "big") != len(held) - 8:
            raise ValueError("it holds no labels in IDX, or ends too early")
    return _labels(path, held[8:], [str(digit) for digit in range(10)])


def _cifar(path: Path, labels: int) -> Iterable[int]:
    """Return the last label of each record: `labels` bytes, and the pixels after them."""
    with reading(path):
        held, record = path.read_bytes(), labels + _PIXELS
        if not held or len(held) % record:
            raise ValueError(f"its {len(held):,} bytes are no records of {record:,}")
        return held[labels - 1 :: record]


def _names(path: Path) -> list[str]:
    with reading(path):
        return [label_of(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _labels(path: Path, labels: Iterable[int], names: Sequence[str]) -> References:
    with reading(path):
        return References(keyed(path, ((number, names[label]) for number, label in enumerate(labels))))
