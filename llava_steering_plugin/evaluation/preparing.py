"""Make LLaVA's training data and question file of a benchmark in its official layout, checked before they appear."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, DataError, listing, shortened
from llava_steering_plugin.evaluation.layouts.entry import Entry
from llava_steering_plugin.evaluation.layouts.registry import layout_of
from llava_steering_plugin.planning.data_check import Checker, check_data, usable_processors
from llava_steering_plugin.training.data.sample_checks import SampleChecks

IMAGES = "images"
SHOWN = 5  # bad samples that a message names
UNKNOWN = "unknown"  # stands for the answer while the pictures of a split without answers are checked


@dataclass(frozen=True)
class Prepared:
    """Say what was made.

    Attributes:
        samples: LLaVA's training data; None: the split has no answers.
        questions: LLaVA's question file.
        entries: how many questions they hold.
        whole: how many the split has.
    """

    samples: Path | None
    questions: Path
    entries: int
    whole: int


def prepare(
    task: str,
    source: Path,
    output: Path,
    *,
    split: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Make TASK_SPLIT.json and TASK_SPLIT.jsonl below `output`, and a link to the images.

    All paths of images are below output/images, where a link called like the task leads to `source`: data of several
    tasks in one `output` can be trained on together. CIFAR's and MNIST's pictures are written there instead.

    Args:
        task: one of `LAYOUTS`.
        source: the benchmark's folder, in the official layout.
        split: None: its first.
        samples: as many of them, drawn with `seed`, in the order of the split; None: all.
        progress: called with the number of pictures that have been checked, and of all.

    Raises:
        ArgumentsError: there is no such task or split, or `output` cannot be written.
        DataError: a file is missing or of another layout, or LLaVA could not be trained on a sample. Nothing is made.
    """
    layout, chosen = layout_of(task, split)
    if not source.is_dir():
        raise DataError(f"there is no folder {source}.")
    entries = list(layout.read(source, chosen))
    if not entries:
        raise DataError(f"{source} holds no questions of the split {chosen!r}.")
    kept = subset(entries, samples, seed)
    name = f"{task}_{chosen}" + (f"_{len(kept)}" if samples is not None else "")
    files = output / f"{name}.json", output / f"{name}.jsonl"
    known = all(entry.answer is not None for entry in kept)
    parts = [file.with_name(f".{file.name}.{os.getpid()}.partial") for file in files]
    link = output / IMAGES / task
    made = False
    try:
        (output / IMAGES).mkdir(parents=True, exist_ok=True)
        drawn = [entry for entry in kept if entry.draw is not None]
        if drawn:
            _draw(drawn, link)
        elif any(entry.image is not None for entry in kept):
            made = _link(link, source)
        learned = kept if known else [replace(entry, answer=UNKNOWN) for entry in kept]
        made_of = [entry.sample(task) for entry in learned]
        _refuse_bad(made_of, parts[0], output / IMAGES, source, progress)
        _write(parts[0], json.dumps(made_of, indent=1) + "\n")
        _write(parts[1], "".join(json.dumps(entry.line(task)) + "\n" for entry in kept))
        for part, file in zip(parts, files, strict=True):
            if known or file is not files[0]:
                os.replace(part, file)
        made = False
    except OSError as error:
        raise ArgumentsError(f"{output} cannot be written: {error.strerror or error}. Choose another.") from error
    finally:
        for leftover in (*parts, *([link] if made else [])):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
    return Prepared(files[0] if known else None, files[1], len(kept), len(entries))


def subset(entries: Sequence[Entry], samples: int | None, seed: int) -> list[Entry]:
    """Return as many entries, drawn with a seed, in their order; None: all of them.

    Raises:
        ArgumentsError: there are fewer.
    """
    if samples is None:
        return list(entries)
    if not 1 <= samples <= len(entries):
        raise ArgumentsError(f"--samples {samples} of {len(entries):,} questions cannot be drawn.")
    return [entries[place] for place in sorted(random.Random(seed).sample(range(len(entries)), samples))]


def _link(link: Path, source: Path) -> bool:
    """Make a link to the benchmark's folder; tell whether it is new.

    Raises:
        ArgumentsError: the name stands for something else.
    """
    if link.is_symlink() and link.resolve() == source.resolve():
        return False
    if link.is_symlink() or link.exists():
        raise ArgumentsError(
            f"{link} is there and does not lead to {source.resolve()}. Remove it, or choose another --output."
        )
    link.symlink_to(source.resolve(), target_is_directory=True)
    return True


def _draw(entries: Sequence[Entry], folder: Path) -> None:
    """Write the pictures that the official files hold in one; those that are there stay.

    Raises:
        ArgumentsError: the folder's name stands for something else.
    """
    if folder.is_symlink():
        raise ArgumentsError(f"{folder} is a link, and should be a folder. Remove it, or choose another --output.")
    for entry in entries:
        assert entry.draw is not None and entry.image is not None
        path = folder / entry.image
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f".{path.name}.{os.getpid()}.partial")
            entry.draw(part)
            os.replace(part, path)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _refuse_bad(
    samples: Sequence[Mapping[str, Any]],
    scratch: Path,
    images: Path,
    source: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Raise the defects that a training would find. A picture that several questions share is decoded once.

    Args:
        scratch: a file for the samples whose pictures are decoded.

    Raises:
        DataError: there are some; the message counts them and names the first.
    """
    first: dict[Any, Mapping[str, Any]] = {}
    for sample in samples:
        first.setdefault(sample.get("image"), sample)
    decoded = list(first.values())
    _write(scratch, json.dumps(decoded) + "\n")
    checks = SampleChecks(str(images))
    report = check_data(
        str(scratch),
        Checker(checks, looks_at_pictures=True),
        processes=usable_processors() if len(decoded) > 100 else 1,  # a process costs more than it spares
        progress=lambda done, position: progress(done, len(decoded)),
    )
    if report.file_problem is not None:
        raise DataError(f"what was read from {source} cannot be checked: {report.file_problem}")
    of_picture = {decoded[problem.index].get("image"): problem.reason for problem in report.problems}
    of_picture.pop(None, None)
    bad = []
    for sample in samples:
        reasons = [defect.reason for defect in checks.structure(sample)]
        if sample.get("image") in of_picture:
            reasons = reasons or [of_picture[sample["image"]]]
        if reasons:
            bad.append(f"{sample['id']}: {reasons[0]}")
    if bad:
        headline = f"LLaVA could not read {len(bad):,} of {len(samples):,} questions from {source}; nothing was made"
        raise DataError(listing(headline, shortened(bad, SHOWN)))
