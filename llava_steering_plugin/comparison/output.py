"""Look after the output folder: one comparison at a time, results of this comparison alone, and what stays valid."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison.cells import FOLDER, Plan
from llava_steering_plugin.comparison.evaluation import find_record
from llava_steering_plugin.comparison.records import FILE, SPLITS, VALIDATION, Record, write_records
from llava_steering_plugin.comparison.training import TRAINED, find_trained
from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.whole_files import runs, write_whole

# The log is there as soon as a comparison is checked; the mark, once its checks have found nothing.
MARK, LOCK, LOG = "comparison.json", ".lock", "compare.log"
FORMAT = 1
# How long the programs of a comparison that was killed may take to end, on a busy machine.
WAIT_SECONDS = 120.0


def output_problems(output: Path) -> list[str]:
    """Return why a folder cannot be the output of a comparison. Nothing is written."""
    if not os.path.lexists(output):
        return []
    if not output.is_dir():
        return [f"output: {output} is no folder"]
    try:
        others = [path for path in output.iterdir() if path.name != LOG and not path.name.startswith(".")]
        if others and not (output / MARK).is_file():
            return [f"output: {output} holds other files, and no comparison; give another folder"]
    except OSError as error:
        return [f"output: {output} cannot be read: {error.strerror}"]
    return []


def validity(plan: Plan, output: Path) -> tuple[list[str], list[str]]:
    """Return the ids of finished cells that are of this comparison, and of those that are not."""
    ended = {
        path.parent.name for path in (output / FOLDER).glob(f"*/{TRAINED}") if find_trained(path.parent) is not None
    }
    known = {cell.id for cell in plan.cells}
    return sorted(ended & known), sorted(ended - known)


def refuse_another(plan: Plan, output: Path) -> list[str]:
    """Return the ids of finished cells that an edited file has left out; they stay on the disk.

    Raises:
        ArgumentsError: all finished cells are of another comparison.
    """
    valid, others = validity(plan, output)
    if others and not valid:
        changes = _changes(plan, output)
        raise ArgumentsError(
            listing(
                f"{output} holds {len(others)} finished cells of another comparison, or of this one before everything "
                "in it was changed. Give another output, or undo the change",
                shortened(changes or others),
            )
        )
    return others


def begin(plan: Plan, output: Path) -> None:
    """Write what this comparison is, for the next run.

    Raises:
        OSError: the folder cannot be written.
    """
    contents = {cell.id: {"method": cell.method.name, **cell.content} for cell in plan.cells}
    cells = json.loads(json.dumps(contents, default=str))
    write_whole(output / MARK, json.dumps({"format": FORMAT, "cells": cells}, indent=1) + "\n")
    (output / FOLDER).mkdir(exist_ok=True)


@contextmanager
def locked(output: Path, waiting: Callable[[], None]) -> Iterator[int]:
    """Keep the folder for this process and those that it starts, for the block; yield the number of the open file.

    Args:
        waiting: called once if programs of a comparison that was killed still keep it.

    Raises:
        ArgumentsError: another comparison keeps it, or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ArgumentsError(f"output: {output} cannot be written: {error.strerror}. Choose another.") from error
    try:
        end, told = time.monotonic() + WAIT_SECONDS, False
        while not _take(lock):
            owner = _owner(lock)
            if runs(owner) or time.monotonic() > end:
                raise ArgumentsError(
                    f"output: {output} is in use by another comparison (process {owner}). Wait for it, or give "
                    "another output."
                )
            if not told:
                waiting()
            told = True
            time.sleep(0.2)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(lock: int) -> int:
    """Return the number of the process that has taken the lock; 0 if it has not said yet."""
    text = os.pread(lock, 20, 0)
    return int(text) if text.isdigit() else 0


def write_results(plan: Plan, output: Path, failed: Sequence[Record], tested: Collection[str]) -> list[Record]:
    """Write results.jsonl: the records of all evaluations that have ended, in the order of the cells.

    Args:
        failed: of this run; they are tried again by the next one.
        tested: the ids of cells that are tested. Test results of a learning rate that was chosen before the file was
            edited stay out.

    Raises:
        OSError: it cannot be written.
    """
    of_failed = {(record.cell, record.split): record for record in failed}
    found = [
        record
        for split in SPLITS
        for cell in plan.cells
        if split == VALIDATION or cell.id in tested
        if (record := find_record(cell, plan, split, output) or of_failed.get((cell.id, split))) is not None
    ]
    write_records(output / FILE, found)
    return found


def _changes(plan: Plan, output: Path) -> list[str]:
    """Return what differs between the cells that were planned before and those that are."""
    try:
        before = json.loads((output / MARK).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    now = [json.loads(json.dumps(cell.content, default=str)) for cell in plan.cells if not cell.method.frozen]
    earlier = [content for content in before.values() if isinstance(content, dict) and "flags" in content]
    found = []
    for name in ("base", "task", "method", "train", "images", "program", "learning rate", "seed"):
        there, here = (_values(contents, name) for contents in (earlier, now))
        if not there & here:
            found.append(f"{name}: {', '.join(sorted(there))} there, {', '.join(sorted(here))} now")
    flags = [
        {f"{flag} {value}" for content in contents for flag, value in content["flags"].items()}
        for contents in (earlier, now)
    ]
    found += [f"flag {flag}: only there" for flag in sorted(flags[0] - flags[1])]
    found += [f"flag {flag}: only now" for flag in sorted(flags[1] - flags[0])]
    return found


def _values(contents: Sequence[dict[str, Any]], name: str) -> set[str]:
    return {json.dumps(content[name]) for content in contents if name in content}
