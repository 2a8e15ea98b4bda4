"""Summarise the records of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from llava_steering_plugin.comparison.records import DIVERGED, DONE, TEST, VALIDATION, Record
from llava_steering_plugin.comparison.results.outcomes import MEAN, has_mean, outcomes_of
from llava_steering_plugin.comparison.results.points import points_of
from llava_steering_plugin.comparison.results.statistics import Points, spread_of
from llava_steering_plugin.comparison.results.summary import (
    Costs,
    Ended,
    Reached,
    Summary,
    TaskSummary,
    Tried,
)
from llava_steering_plugin.errors import ArgumentsError, nearest


def summarise(records: Sequence[Record], output: Path, reference: str | None = None) -> Summary:
    """Summarise the records of a comparison.

    Args:
        records: in the order in which tasks and methods are shown.
        output: the folder in which the records' files are.
        reference: the method from which the others differ; None: the first that is trained.

    Raises:
        ArgumentsError: there are no records, no such method, or files of theirs cannot be read.
    """
    if not records:
        raise ArgumentsError("there are no results yet: no cell has ended.")
    methods = list(dict.fromkeys(record.method for record in records))
    trained = [method for method in methods if not _is_frozen([r for r in records if r.method == method])]
    if reference is not None and reference not in methods:
        hint = nearest(reference, methods)
        raise ArgumentsError(f"there is no method {reference!r}: {hint}known: {', '.join(methods)}.")
    reference = reference or (trained or methods)[0]
    points = points_of((record for record in records if record.split == TEST and record.status == DONE), output)
    tasks = dict.fromkeys(record.task for record in records)
    return Summary(
        reference,
        tuple(_task(task, [r for r in records if r.task == task], methods, reference, points) for task in tasks),
        tuple(_ended(records)),
        len({record.cell for record in records}),
        _versions(records),
        tuple(sorted({_commit(record) for record in records if record.git.get("commit")})),
        min((record.started for record in records if record.started), default=""),
        max((record.ended for record in records if record.ended), default=""),
    )


def _is_frozen(records: Sequence[Record]) -> bool:
    """Tell whether records are those of the base itself."""
    return all(record.learning_rate == 0.0 for record in records)


def _task(
    task: str,
    records: Sequence[Record],
    methods: Sequence[str],
    reference: str,
    points: Mapping[tuple[str, str], Points],
) -> TaskSummary:
    """Summarise one task; methods that have no record of it are not shown."""
    own = {method: found for method in methods if (found := [each for each in records if each.method == method])}
    tests = _tests(records, TEST)
    frozen = {method for method, found in own.items() if _is_frozen(found)}
    done = {
        method: {each.seed: each for each in found if each.split == TEST and each.status == DONE}
        for method, found in own.items()
    }
    if has_mean(tests, [each for by_seed in done.values() for each in by_seed.values()], points):
        tests = {MEAN: "", **tests}
    seeds = sorted({seed for method, by_seed in done.items() if method not in frozen for seed in by_seed})
    # The base has no seed of its own: it stands beside every one of them.
    spread_out = {
        method: dict.fromkeys(seeds or by_seed, next(iter(by_seed.values())))
        if method in frozen and by_seed
        else by_seed
        for method, by_seed in done.items()
    }
    reached = []
    for method, found in own.items():
        rate = None if method in frozen else _chosen(found)
        against = None if method == reference else spread_out.get(reference, {})
        outcomes = outcomes_of(tests, list(done[method].values()), spread_out[method], against, points)
        tried = {each.seed for each in found if method in frozen or each.learning_rate == rate}
        reached.append(
            Reached(
                method,
                method in frozen,
                rate,
                tuple(sorted(tried)),
                tuple(sorted(done[method])),
                outcomes,
                _costs(list(done[method].values())),
            )
        )
    validation = tuple(_tests(records, VALIDATION))
    tried_rates = [
        _tried(method, rate, rate == _chosen(found), [each for each in found if each.learning_rate == rate], validation)
        for method, found in own.items()
        for rate in sorted({each.learning_rate for each in found if each.split == VALIDATION})
    ]
    return TaskSummary(task, reference, tests, tuple(reached), validation, tuple(tried_rates))


def _tests(records: Sequence[Record], split: str) -> dict[str, str]:
    """Return the benchmarks of all tests of a split, by the tests' names."""
    of_split = [record for record in records if record.split == split]
    return {test: score.benchmark for record in of_split for test, score in record.scores.items()}


def _chosen(records: Sequence[Record]) -> float | None:
    """Return the learning rate that came to the test; None: none did."""
    return next((record.learning_rate for record in records if record.split == TEST), None)


def _costs(records: Sequence[Record]) -> Costs | None:
    if not records:
        return None
    first = records[0]

    def mean(name: str) -> float | None:
        values = [value for record in records if (value := float(getattr(record, name))) > 0]
        return fmean(values) if values else None

    peak = mean("peak_bytes")
    return Costs(
        first.trained_parameters,
        first.projector_parameters,
        first.file_bytes,
        mean("step_seconds"),
        mean("step_ratio"),
        mean("answer_seconds"),
        mean("answer_ratio"),
        None if peak is None else round(peak),
    )


def _tried(method: str, rate: float, chosen: bool, records: Sequence[Record], tests: Sequence[str]) -> Tried:
    of_split = [record for record in records if record.split == VALIDATION]
    done = [record for record in of_split if record.status == DONE]
    losses = [record.eval_loss for record in done if record.eval_loss is not None]
    diverged = sum(record.status == DIVERGED for record in of_split)
    return Tried(
        method,
        rate,
        chosen,
        len(of_split),
        len(done),
        diverged,
        len(of_split) - len(done) - diverged,
        {test: spread_of([record.scores[test].score for record in done if test in record.scores]) for test in tests},
        spread_of(losses),
    )


def _ended(records: Sequence[Record]) -> list[Ended]:
    """Return the cells that are not done, each once."""
    found: dict[str, Ended] = {}
    for each in records:
        if each.status != DONE and each.cell not in found:
            reason = " ".join((each.error or "no reason was kept").split())
            found[each.cell] = Ended(
                each.task, each.method, each.learning_rate, each.seed, each.split, each.status, reason
            )
    return list(found.values())


def _versions(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """Return the versions of each package that records name: more than one where they differ."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.versions.items():
            found.setdefault(package, set()).add(str(version))
    return {package: tuple(sorted(versions)) for package, versions in sorted(found.items())}


def _commit(record: Record) -> str:
    return f"{str(record.git['commit'])[:12]}{', with changes' if record.git.get('dirty') else ''}"
