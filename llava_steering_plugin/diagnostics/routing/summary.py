"""Summarise the routing of adapters for JSON and CSV: use of factors, what choices tell, and what they are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy
import torch

from llava_steering_plugin.diagnostics.intervals import one_with_interval, plain
from llava_steering_plugin.diagnostics.records import KEY, Records
from llava_steering_plugin.diagnostics.routing.one_model import FORCED, Tasks, measured_samples
from llava_steering_plugin.measures.routing import (
    SIDES,
    Choices,
    entropy,
    multi_hot,
    mutual_information,
    overlap,
    use,
)

ALONE = "one task: mutual information, overlap and t-SNE by task are left out"
# t-SNE of fewer points says nothing; above so many, the exact algorithm takes minutes.
FEWEST, EXACT = 4, 500
PERPLEXITY = 30


def summarise_routing(name: str, about: Mapping[str, Any], records: Records, tasks: Tasks, seed: int) -> dict[str, Any]:
    """Return the summary of one adapter, ready for JSON (docs/diagnostics.md lists its keys).

    Args:
        about: what is known of the adapter: kind, path, base, settings, `factors`, `selection`.
        seed: of t-SNE.
    """
    found = measured_samples(records, tasks)
    of = [task for task, _, _ in found]
    rows = [_by_place(record["choices"]) for _, _, record in found]
    several = len(set(of)) > 1
    places = [_place(rows, of, place, about["factors"], several) for place in rows[0]]
    forced = {tuple(row[KEY][1:]): row["forced"] for row in records if row[KEY][0] == FORCED}
    pairs = [(record, forced[task, sample.file, sample.number]) for task, sample, record in found]
    reasons = Counter(str(record["left_out"]) for record in records if "left_out" in record)
    embedded = several and len(rows) >= FEWEST
    return {
        "name": name,
        **about,
        "samples": {task: of.count(task) for task in tasks},
        "left_out": dict(reasons),
        "notes": [] if several else [ALONE],
        "places": places,
        "sides": {side: _mean_of(places, side) for side in SIDES},
        "overlap": {side: _overlaps(rows, of, side, about["factors"]) for side in SIDES} if several else None,
        "own": _own([record for record, _ in pairs], of),
        "forced": {
            variant: _lost(pairs, of, variant) for variant in dict.fromkeys(each for _, f in pairs for each in f)
        },
        "points": of if embedded else None,
        "embeddings": {side: _embedded(rows, found, side, about["factors"], seed) for side in SIDES}
        if embedded
        else None,
    }


def routing_rows(document: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the rows of routing.csv, the heading first.

    What the choices are worth: a row for each model, variant, task (or "all") and quantity. What they are: a row for
    each model, layer, linear, side and quantity.
    """
    yield ["model", "quantity", "of", "layer", "linear", "side", "mean", "low", "high"]
    for model in document["models"]:
        name = model["name"]
        for variant, lost in {"own": model["own"], **model["forced"]}.items():
            for task, quantities in {"all": lost["over_all"], **lost["tasks"]}.items():
                for quantity, value in quantities.items():
                    ends = [value[end] for end in ("mean", "low", "high")]
                    yield [name, f"{variant}: {quantity}", task, None, None, None, *ends]
        for place in model["places"]:
            where = [place["layer"], place["linear"], place["side"]]
            for quantity in ("entropy", "overlap", "mutual_information"):
                if place[quantity] is not None:
                    yield [name, quantity, None, *where, place[quantity], None, None]
            for task, shares in {"all": place["use"], **place["use_by_task"]}.items():
                for factor, share in enumerate(shares):
                    yield [name, f"use of factor {factor}", task, *where, share, None, None]


def _by_place(named: Mapping[str, Sequence[Any]]) -> Choices:
    """Return what a record keeps by (layer and linear, side)."""
    found = {}
    for name, values in named.items():
        where, _, side = name.rpartition(" ")
        found[where, side] = torch.tensor(values)
    return found


def _place(
    rows: Sequence[Choices], of: Sequence[str], place: tuple[str, str], factors: int, several: bool
) -> dict[str, Any]:
    """Return what the choices at one linear and side are like."""
    layer, _, linear = place[0].partition(" ")
    by_task = _grouped(rows, of)
    shares = use(rows, place, factors)
    pairs = [overlap(one, other, place, factors) for one, other in combinations(by_task.values(), 2)]
    return {
        "layer": int(layer),
        "linear": linear,
        "side": place[1],
        "use": plain(shares),
        "use_by_task": {task: plain(use(own, place, factors)) for task, own in by_task.items()},
        "entropy": _rounded(entropy(shares)),
        "overlap": _rounded(float(numpy.mean(pairs))) if several else None,
        "mutual_information": _rounded(mutual_information(rows, of, place)) if several else None,
    }


def _mean_of(places: Sequence[Mapping[str, Any]], side: str) -> dict[str, float | None]:
    """Return the means over all linears of one side."""
    mine = [place for place in places if place["side"] == side]
    return {
        quantity: None if mine[0][quantity] is None else _rounded(numpy.mean([place[quantity] for place in mine]))
        for quantity in ("entropy", "overlap", "mutual_information")
    }


def _overlaps(rows: Sequence[Choices], of: Sequence[str], side: str, factors: int) -> list[list[float | None]]:
    """Return how much every two tasks choose alike, the mean over the linears of one side, [tasks][tasks]."""
    by_task = list(_grouped(rows, of).values())
    mine = [place for place in rows[0] if place[1] == side]
    return [
        plain([numpy.mean([overlap(one, other, place, factors) for place in mine]) for other in by_task])
        for one in by_task
    ]


def _grouped(rows: Sequence[Choices], of: Sequence[str]) -> dict[str, list[Choices]]:
    return {task: [row for row, its in zip(rows, of, strict=True) if its == task] for task in dict.fromkeys(of)}


def _own(records: Sequence[Mapping[str, Any]], of: Sequence[str]) -> dict[str, Any]:
    """Return loss and accuracy with the routers' own choices."""
    return _by_task({name: [record[name] for record in records] for name in ("loss", "accuracy")}, of)


def _lost(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], of: Sequence[str], variant: str
) -> dict[str, Any]:
    """Return what is lost with other choices: differences within each sample, of the mean over the repeats."""
    loss, accuracy, counted = [], [], []
    for (own, forced), task in zip(pairs, of, strict=True):
        if variant not in forced:
            continue
        counted.append(task)
        # Differences first: choices that change nothing have differences of exactly 0, whose mean is 0.
        loss.append(numpy.mean([repeat[0] - own["loss"] for repeat in forced[variant]]))
        accuracy.append(numpy.mean([own["accuracy"] - repeat[1] for repeat in forced[variant]]))
    return _by_task({"loss_added": loss, "accuracy_lost": accuracy}, counted)


def _by_task(values: Mapping[str, Sequence[float]], of: Sequence[str]) -> dict[str, Any]:
    """Return means with intervals over all samples, and over those of each task."""

    def of_task(task: str) -> dict[str, Any]:
        return {
            name: one_with_interval([value for value, its in zip(each, of, strict=True) if its == task])
            for name, each in values.items()
        }

    return {
        "over_all": {name: one_with_interval(each) for name, each in values.items()},
        "tasks": {task: of_task(task) for task in dict.fromkeys(of)},
    }


def _embedded(rows: Sequence[Choices], found: Sequence[Any], side: str, factors: int, seed: int) -> dict[str, Any]:
    """Return the places of all samples in t-SNE's planes, [samples][2] each; null where all samples are alike."""
    from sklearn.metrics import pairwise_distances

    chosen = multi_hot([{place: each for place, each in row.items() if place[1] == side} for row in rows], factors)
    scores = numpy.array(
        [
            [value for name, values in record["scores"].items() if name.endswith(f" {side}") for value in values]
            for _, _, record in found
        ]
    )
    return {
        "selections": _tsne(pairwise_distances(chosen.numpy(), metric="jaccard"), seed),
        "scores": _tsne(pairwise_distances(scores), seed),
    }


def _tsne(distances: Any, seed: int) -> list[list[float | None]] | None:
    from sklearn.manifold import TSNE

    if not distances.any():
        return None
    count = len(distances)
    method = TSNE(
        metric="precomputed",
        init="random",
        method="exact" if count <= EXACT else "barnes_hut",
        perplexity=min(PERPLEXITY, (count - 1) / 3),
        random_state=seed,
    )
    return [plain(row) for row in method.fit_transform(distances)]


def _rounded(value: Any) -> float:
    return float(f"{value:.6g}")
