"""Check all samples of a data file before a training, with the checks that the training makes."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.planning.data_file import samples_in
from llava_steering_plugin.planning.data_report import DataReport, Finding
from llava_steering_plugin.training.data.pictured import has_pictures
from llava_steering_plugin.training.data.sample_checks import Defect, SampleChecks
from llava_steering_plugin.training.data.source import failure

if TYPE_CHECKING:
    from llava_steering_plugin.upstream.text.tokens import TokenCounter

CHUNK = 32  # samples that a process checks at a time
AHEAD = 4  # chunks that wait for each process


@dataclass(frozen=True)
class Checker:
    """Checks one sample after the other, in any process.

    Attributes:
        looks_at_pictures: pictures are opened and decoded.
        counter: counts tokens; None: they are not counted.
    """

    checks: SampleChecks
    looks_at_pictures: bool
    counter: TokenCounter | None = None

    def check(self, sample: Any) -> Finding:
        """Return what is wrong with a sample, and how long it is."""
        found = self.checks.of(sample, whole=True) if self.looks_at_pictures else self.checks.structure(sample)
        is_object = isinstance(sample, Mapping)
        identity = sample.get("id") if is_object else None
        pictured = is_object and has_pictures(sample, several=self.checks.several)
        if found or self.counter is None:
            return Finding(identity, pictured, tuple(found))
        try:
            tokens, learned = self._length(sample)
        except DataError as error:
            return Finding(identity, pictured, (Defect("other", str(error)),))
        if tokens is None:
            return Finding(identity, pictured, ())
        return Finding(identity, pictured, (), tokens, learned)

    def _length(self, sample: Mapping[str, Any]) -> tuple[int | None, int]:
        assert self.counter is not None
        try:
            length = self.counter.count(sample)
        except Exception as error:  # tokenizers raise all kinds of errors
            raise DataError(failure(error)) from error
        return (None, 0) if length is None else (length.tokens, length.learned)


def check_data(
    path: str,
    checker: Checker,
    *,
    keep: int | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda samples, position: None,
) -> DataReport:
    """Check all samples of a data file.

    Args:
        keep: how many problems of a kind are kept in the report; None: all.
        processes: how many work at the same time.
        progress: called with the number of samples that have been checked, and of bytes that have been read for them.

    Raises:
        DataError: the file cannot be read at all, or a process was killed.
    """
    counter = checker.counter
    report = DataReport(path, keep, None if counter is None else counter.longest)
    if counter is not None:
        report.notes += counter.notes
    read = _Chunks(path)
    for findings, position in _in_processes(read, checker, processes) if processes > 1 else _here(read, checker):
        for finding in findings:
            report.add(finding)
        progress(report.samples, position)
    report.file_problem = read.problem
    if not checker.looks_at_pictures and report.samples > report.text_only:
        report.notes.append("no image was looked at: give --image-folder")
    return report


class _Chunks:
    """Yields chunks of samples, and the position in the file after each; keeps the error that ends the file."""

    def __init__(self, path: str):
        self.samples = samples_in(path)
        self.problem: str | None = None

    def __iter__(self) -> Iterator[tuple[list[Any], int]]:
        while chunk := list(self._some()):
            yield [sample for sample, _ in chunk], chunk[-1][1]

    def _some(self) -> Iterator[tuple[Any, int]]:
        try:
            yield from islice(self.samples, CHUNK)
        except DataError as error:
            self.problem = str(error)


def _here(chunks: Iterable[tuple[list[Any], int]], checker: Checker) -> Iterator[tuple[list[Finding], int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of large pictures and odd metadata
        for chunk, position in chunks:
            yield [checker.check(sample) for sample in chunk], position


def _in_processes(
    chunks: Iterable[tuple[list[Any], int]], checker: Checker, processes: int
) -> Iterator[tuple[list[Finding], int]]:
    # A fork has what the checker needs; elsewhere it is sent.
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    waiting: deque[tuple[Future[list[Finding]], int]] = deque()
    done = 0
    with ProcessPoolExecutor(processes, multiprocessing.get_context(kind), _start, (checker,)) as pool:
        try:
            for chunk, position in chunks:
                waiting.append((pool.submit(_check, chunk), position))
                if len(waiting) > processes * AHEAD:
                    yield _result(waiting, done)
                    done += CHUNK
            while waiting:
                yield _result(waiting, done)
                done += CHUNK
        finally:
            pool.shutdown(cancel_futures=True)


def _result(waiting: deque[tuple[Future[list[Finding]], int]], first: int) -> tuple[list[Finding], int]:
    future, position = waiting.popleft()
    try:
        return future.result(), position
    except BrokenProcessPool as error:
        raise DataError(
            f"a process was killed while it checked samples {first} and later ones, perhaps for its memory. Try again "
            "with --processes 1."
        ) from error


_checker: Checker | None = None  # of a process of the pool


def _start(checker: Checker) -> None:
    global _checker
    _checker = checker
    warnings.simplefilter("ignore")


def _check(chunk: list[Any]) -> list[Finding]:
    assert _checker is not None
    return [_checker.check(sample) for sample in chunk]


def usable_processors() -> int:
    """Return how many processors this process may use, at most 8: more would wait for the disk."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, count)
