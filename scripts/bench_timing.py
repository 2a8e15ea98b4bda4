"""Interleaved timing for the benchmarks: variants run in turns, and ratios are taken within one turn.

A machine's speed drifts by tens of per cent over minutes (other processes, clocks). Variants that run one after the
other measure that drift; variants that run in turns share it. A variant that is the baseline once more, under another
name, is the control: what its ratio differs from 1 is what this machine cannot resolve.

    samples = interleave({"frozen": frozen, "control": frozen, "adapter": adapter}, rounds=30)
    timings = summarise(samples, baseline="frozen")
    Console().print(ratio_table("forward + backward", timings))
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

REFERENCE = "mean of these two"
Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Timing:
    """One variant: seconds a call, and its ratio to the baseline in the same turn. Medians and quartiles."""

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
) -> dict[str, list[float]]:
    """Calls every variant once a round, in an order that rotates, and returns the seconds of each call.

    Args:
        variants: callables by name; each must leave things as it found them (clear its gradients).
        rounds: measured calls of each variant.
        warmup: calls of each before that, not measured.
        seconds_each: a call shorter than this is repeated until it lasts as long, and the mean counts: for what takes
            microseconds, where the clock and the jump into Python would show.
        clock: `time.process_time` counts only what this process computes, in all its threads: with one thread, and
            no GPU, the fairer clock on a machine that is shared.
    """
    names = list(variants)
    for name in names:
        for _ in range(warmup):
            variants[name]()
    _wait_for_device()
    repeats = {name: _repeats(variants[name], seconds_each, clock) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into whichever variant runs just then
    try:
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                samples[name].append(_timed(variants[name], repeats[name], clock))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples


def fair_clock() -> Callable[[], float]:
    """Processor time if torch has one thread, so that other processes count little; with more, the wall clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def with_reference(samples: Samples, baseline: str, control: str) -> dict[str, Sequence[float]]:
    """The samples, and under REFERENCE what the baseline took in each turn: it ran twice, once as the control."""
    means = [(first + second) / 2 for first, second in zip(samples[baseline], samples[control], strict=True)]
    return {**samples, REFERENCE: means}


def excesses(samples: Samples, name: str) -> list[float]:
    """How much longer than the reference it took, in each turn, as a fraction."""
    return [mine / frozen - 1 for mine, frozen in zip(samples[name], samples[REFERENCE], strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median (88 % from four values), from order statistics: no distribution is assumed."""
    ordered = sorted(values)
    outside = max(0, int(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5))
    return ordered[outside], ordered[len(ordered) - 1 - outside]


def until_decided(
    variants: Mapping[str, Callable[[], object]],
    judged: Callable[[Samples], Mapping[str, Sequence[float]]],
    *,
    limit: float | None,
    turns: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Takes turns until the interval of every median excess lies on one side of the limit, or the time is up.

    Stopping depends on certainty, not on success.

    Args:
        variants, clock: as `interleave` takes them.
        judged: the excesses that decide, a value for each turn, of the samples so far.
        limit: None: nothing is decided, only the time ends it.
        turns: taken at a time.
        seconds: wall time after which no more turns are added.
    """
    start = time.perf_counter()
    samples = interleave(variants, rounds=turns, warmup=1, clock=clock)
    while time.perf_counter() - start < seconds:
        intervals = map(interval, judged(samples).values())
        if limit is not None and all(high <= limit or low > limit for low, high in intervals):
            break
        for name, more in interleave(variants, rounds=turns, warmup=0, clock=clock).items():
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
    """Medians and quartiles of the seconds, and of the ratios to the baseline's call in the same round."""
    timings = {}
    for name, seconds in samples.items():
        ratios = [mine / other for mine, other in zip(seconds, samples[baseline], strict=True)]
        timings[name] = Timing(name, len(seconds), *_quartiles(seconds), *_quartiles(ratios))
    return timings


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio_table(title: str, timings: Mapping[str, Timing]) -> Table:
    """A table of milliseconds and ratios with their quartiles."""
    table = Table(title=title, title_justify="left")
    for heading in ("variant", "ms", "quartiles", "ratio", "quartiles"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
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


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at start": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a benchmark's results; `Timing`s become plain objects."""
    path.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")
