"""Time variants in rounds, and compare them within one round.

A machine's speed drifts by tens of per cent over minutes (other processes, clock rates). Variants that run one after
the other measure that drift; variants that run in rounds share it. The control is the baseline a second time, under
another name: the difference of its ratio from 1 is the resolution of this machine.

    samples = interleave({"frozen": frozen, "control": frozen, "adapter": adapter}, rounds=30)
    timings = summarise(samples, baseline="frozen")
    Console().print(ratio_table("forward + backward", timings))
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from .verdicts import table_of

REFERENCE = "mean of these two"
Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, and its ratio to the baseline of the same round: medians and quartiles."""

    name: str
    rounds: int
    seconds: float
    seconds_low: float
    seconds_high: float
    ratio: float
    ratio_low: float
    ratio_high: float


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    seconds_each: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    order: random.Random | None = None,
) -> dict[str, list[float]]:
    """Call every variant once per round, each round in another order, and return the seconds of each call.

    The orders are random, and the same in every run: a variant that always follows the same one would always find the
    same caches and the same free memory, which costs some per cent.

    Args:
        variants: callables by name; each must restore the state that it found (clear its gradients).
        rounds: measured calls of each variant.
        warmup: calls of each variant before the measurement.
        seconds_each: shortest time of a measurement. A shorter call is repeated, and the mean counts: for calls of
            microseconds, where the cost of the clock would show.
        clock: `time.process_time` counts only the work of this process, in all its threads. With one thread and
            without a GPU it is the fairer clock on a shared machine.
        order: draws the orders; None: the first ones.
    """
    names, order = list(variants), order or random.Random(0)
    for name in names:
        for _ in range(warmup):
            variants[name]()
    _wait_for_device()
    repeats = {name: _repeats(variants[name], seconds_each, clock) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection would count for the variant that happens to run
    try:
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                samples[name].append(_timed(variants[name], repeats[name], clock))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples


def fair_clock() -> Callable[[], float]:
    """Return processor time if torch has one thread (other processes then count little), else the wall clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def with_reference(samples: Samples, baseline: str, control: str) -> dict[str, Sequence[float]]:
    """Add under REFERENCE the baseline's mean in each round: it ran twice, once as the control."""
    means = [(first + second) / 2 for first, second in zip(samples[baseline], samples[control], strict=True)]
    return {**samples, REFERENCE: means}


def excesses(samples: Samples, name: str) -> list[float]:
    """Return by how much it took longer than the reference in each round, as a fraction."""
    return [mine / frozen - 1 for mine, frozen in zip(samples[name], samples[REFERENCE], strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median (88 % from four values), from order statistics without a distribution."""
    ordered = sorted(values)
    outside = max(0, int(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5))
    return ordered[outside], ordered[len(ordered) - 1 - outside]


def figures(samples: Samples, timing: Timing) -> dict[str, Any]:
    """Return a variant's timing with its excess over the reference and the interval of that, for the JSON file."""
    return {**asdict(timing), "excess": timing.ratio - 1, "interval": interval(excesses(samples, timing.name))}


def until_decided(
    variants: Mapping[str, Callable[[], object]],
    judged: Callable[[Samples], Mapping[str, Sequence[float]]],
    *,
    limit: float | None,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Add rounds until the interval of every median excess lies on one side of the limit, or the time is up.

    The end depends on certainty, not on success.

    Args:
        variants, clock: as in `interleave`.
        judged: returns the excesses to judge, one value per round, from the samples so far.
        limit: the limit; None to stop only when the time is up.
        rounds: number of rounds that are added at a time.
        seconds: wall-clock time after which no rounds are added.
    """
    start, order = time.perf_counter(), random.Random(0)
    samples = interleave(variants, rounds=rounds, warmup=1, clock=clock, order=order)
    while time.perf_counter() - start < seconds:
        intervals = map(interval, judged(samples).values())
        if limit is not None and all(high <= limit or low > limit for low, high in intervals):
            break
        for name, more in interleave(variants, rounds=rounds, warmup=0, clock=clock, order=order).items():
            samples[name] += more
    return samples


def _timed(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    _wait_for_device()
    start = clock()
    for _ in range(repeats):
        call()
    _wait_for_device()
    return (clock() - start) / repeats


def _repeats(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> int:
    if not seconds:
        return 1
    once = min(_timed(call, 1, clock) for _ in range(3))
    return max(1, round(seconds / once))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarise(samples: Mapping[str, Sequence[float]], *, baseline: str) -> dict[str, Timing]:
    """Return medians and quartiles of the seconds, and of the ratios to the baseline's call of the same round."""
    timings = {}
    for name, seconds in samples.items():
        ratios = [mine / other for mine, other in zip(seconds, samples[baseline], strict=True)]
        timings[name] = Timing(name, len(seconds), *_quartiles(seconds), *_quartiles(ratios))
    return timings


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio_table(title: str, timings: Mapping[str, Timing]) -> Table:
    """Return a table of milliseconds and ratios with their quartiles."""
    table = table_of(title, ("variant", "ms", "quartiles", "ratio", "quartiles"))
    for timing in timings.values():
        milliseconds = [1e3 * value for value in (timing.seconds, timing.seconds_low, timing.seconds_high)]
        table.add_row(
            timing.name,
            f"{milliseconds[0]:.3f}",
            f"{milliseconds[1]:.3f} .. {milliseconds[2]:.3f}",
            f"{timing.ratio:.3f}",
            f"{timing.ratio_low:.3f} .. {timing.ratio_high:.3f}",
        )
    return table
