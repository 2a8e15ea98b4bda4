"""CIFAR-10, CIFAR-100 and MNIST: pictures that lie in one binary file, and become PNG files."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llava_steering_plugin.evaluation.layouts.entry import SHORT, Entry, asked
from llava_steering_plugin.evaluation.official_files import official, reading
from llava_steering_plugin.evaluation.scores.labels import label_of

SIDE, DIGIT_SIDE = 32, 28
PIXELS = 3 * SIDE * SIDE
_IMAGES, _LABELS = bytes((0, 0, 8, 3)), bytes((0, 0, 8, 1))  # how IDX files of bytes begin


def cifar10(source: Path, split: str) -> Iterator[Entry]:
    """Yield CIFAR-10's pictures, of the binary version."""
    folder = official(source, "batches.meta.txt", "cifar-10-batches-bin/batches.meta.txt").parent
    files = ["test_batch.bin"] if split == "test" else [f"data_batch_{number}.bin" for number in range(1, 6)]
    yield from _cifar([folder / name for name in files], folder / "batches.meta.txt", 1)


def cifar100(source: Path, split: str) -> Iterator[Entry]:
    """Yield CIFAR-100's pictures with their fine labels, of the binary version."""
    folder = official(source, "fine_label_names.txt", "cifar-100-binary/fine_label_names.txt").parent
    yield from _cifar([folder / f"{split}.bin"], folder / "fine_label_names.txt", 2)


def _cifar(files: Sequence[Path], names_file: Path, labels: int) -> Iterator[Entry]:
    with reading(names_file):
        names = [label_of(line) for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    question = asked(f"Which of these does the image show: {', '.join(names)}?", SHORT)
    number, record = 0, labels + PIXELS
    for file in files:
        with reading(file):
            held = file.read_bytes()
            if not held or len(held) % record:
                raise ValueError(f"its {len(held):,} bytes are no records of {record:,}")
            for start in range(0, len(held), record):
                pixels = held[start + labels : start + record]
                answer = names[held[start + labels - 1]]
                yield Entry(number, question, answer, f"{file.stem}/{number}.png", draw=_colours(pixels))
                number += 1


def _colours(pixels: bytes) -> Callable[[Path], None]:
    """Return what writes a picture that is stored by colour: 1,024 bytes of red, of green and of blue."""

    def draw(path: Path) -> None:
        from PIL import Image

        plane = SIDE * SIDE
        planes = [Image.frombytes("L", (SIDE, SIDE), pixels[at : at + plane]) for at in range(0, PIXELS, plane)]
        Image.merge("RGB", planes).save(path, "PNG")

    return draw


def mnist(source: Path, split: str) -> Iterator[Entry]:
    """Yield MNIST's digits, of the IDX files, packed or not."""
    name = "t10k" if split == "test" else "train"
    images = official(source, f"{name}-images-idx3-ubyte", f"{name}-images-idx3-ubyte.gz")
    labels = official(source, f"{name}-labels-idx1-ubyte", f"{name}-labels-idx1-ubyte.gz")
    with reading(labels):
        answers = _unpacked(labels)
        if answers[:4] != _LABELS:
            raise ValueError("it holds no labels in IDX")
    with reading(images):
        held, record = _unpacked(images), DIGIT_SIDE * DIGIT_SIDE
        if held[:4] != _IMAGES or len(held) - 16 != record * (len(answers) - 8):
            raise ValueError(f"it does not hold the {len(answers) - 8:,} images of {labels.name} in IDX")
        for number, answer in enumerate(answers[8:]):
            pixels = held[16 + number * record : 16 + (number + 1) * record]
            question = asked("Which digit does the image show?", SHORT)
            yield Entry(number, question, str(answer), f"{name}/{number}.png", draw=_digit(pixels))


def _unpacked(path: Path) -> bytes:
    held = path.read_bytes()
    try:
        return gzip.decompress(held) if path.suffix == ".gz" else held
    except EOFError as error:
        raise ValueError("it ends too early") from error


def _digit(pixels: bytes) -> Callable[[Path], None]:
    def draw(path: Path) -> None:
        from PIL import Image

        Image.frombytes("L", (DIGIT_SIDE, DIGIT_SIDE), pixels).save(path, "PNG")

    return draw
