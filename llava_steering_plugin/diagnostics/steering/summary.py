"""Summarise the steering of adapters for JSON and CSV: sizes, costs of layers left out, angles between subspaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy
from torch import Tensor

from llava_steering_plugin.diagnostics.intervals import one_with_interval, plain, with_interval
from llava_steering_plugin.measures.steering import chance_similarity, principal_cosines, similarity

Bases = Mapping[tuple[int, str], Tensor]


def summarise_steering(
    name: str, about: Mapping[str, Any], records: Iterable[Mapping[str, Any]], bases: Bases, without_image: int
) -> dict[str, Any]:
    """Return the summary of one adapter, ready for JSON (docs/diagnostics.md lists its keys).

    Args:
        about: what is known of the adapter: kind, path, base, settings.
        records: its measurements.
        bases: its subspaces, by the layer's number and the modality.
        without_image: how many questions or samples are about no image.
    """
    rows = list(records)
    measured = [record for record in rows if "left_out" not in record]
    reasons = Counter(str(record["left_out"]) for record in rows if "left_out" in record)
    layers = sorted({layer for layer, _ in bases})
    modalities = sorted({modality for _, modality in bases}, reverse=True)
    cost = with_interval([[record["without"][str(n)] - record["loss"] for n in layers] for record in measured])
    return {
        "name": name,
        **about,
        "answers": len(measured),
        "left_out": {"about no image": without_image, **reasons},
        "layers": layers,
        "norms": {modality: _norms(measured, layers, modality) for modality in modalities},
        "loss": {
            "on": one_with_interval([record["loss"] for record in measured]),
            "off": one_with_interval([record["off"] for record in measured]),
        },
        "cost": cost,
        "cost_of_all": one_with_interval([record["off"] - record["loss"] for record in measured]),
        "no_cost_seen": [n for n, low in zip(layers, cost["low"], strict=False) if low is not None and low <= 0],
        "cosines": {
            modality: [plain([similarity(bases[a, modality], bases[b, modality]) for b in layers]) for a in layers]
            for modality in modalities
        },
        "cosines_by_chance": {
            modality: _by_chance(bases[layers[0], modality], bases[layers[0], modality]) for modality in modalities
        },
    }


def compare_subspaces(bases: Mapping[str, Bases]) -> list[dict[str, Any]]:
    """Return the angles between the subspaces of every two adapters, layer by layer.

    Args:
        bases: of each adapter, by its name.
    """
    found = []
    for one, other in combinations(bases, 2):
        shared = [place for place in bases[one] if place in bases[other]]
        for modality in sorted({modality for _, modality in shared}, reverse=True):
            layers = [layer for layer, each in shared if each == modality]
            pairs = [(bases[one][layer, modality], bases[other][layer, modality]) for layer in layers]
            found.append(
                {
                    "models": [one, other],
                    "modality": modality,
                    "layers": layers,
                    "mean": plain([similarity(*pair) for pair in pairs]),
                    "principal": [plain(principal_cosines(*pair)) for pair in pairs],
                    "by_chance": _by_chance(*pairs[0]),
                }
            )
    return found


def steering_rows(document: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the rows of steering.csv, the heading first.

    One for each model, layer and quantity; `of` is a modality, or the layer or model that a subspace is compared with.
    """
    yield ["model", "layer", "quantity", "of", "mean", "low", "high", "answers"]
    for model in document["models"]:
        name, layers, answers = model["name"], model["layers"], model["answers"]
        for modality, norms in model["norms"].items():
            for row in zip(layers, norms["mean"], norms["low"], norms["high"], strict=False):
                yield [name, row[0], "norm", modality, *row[1:], answers]
        cost = model["cost"]
        for row in zip(layers, cost["mean"], cost["low"], cost["high"], strict=False):
            yield [name, row[0], "cost", "", *row[1:], answers]
        whole = model["cost_of_all"]
        yield [name, "all", "cost", "", whole["mean"], whole["low"], whole["high"], answers]
        for modality, matrix in model["cosines"].items():
            for layer, row in zip(layers, matrix, strict=True):
                for other, value in zip(layers, row, strict=True):
                    yield [name, layer, "cosine", f"layer {other} {modality}", value, None, None, None]
    for pair in document["pairs"]:
        one, other = pair["models"]
        for layer, mean in zip(pair["layers"], pair["mean"], strict=True):
            yield [one, layer, "cosine", f"{other} {pair['modality']}", mean, None, None, None]


def _norms(measured: Sequence[Mapping[str, Any]], layers: Sequence[int], modality: str) -> dict[str, Any]:
    """Return the mean relative norm by layer with its interval, and its spread over tokens and over answers."""
    table = numpy.array([[record["norms"][f"{n} {modality}"] for n in layers] for record in measured], dtype=float)
    if not len(table):
        return {"mean": [], "low": [], "high": [], "spread_tokens": [], "spread_answers": [], "tokens": None}
    steered = table[table[:, 0, 2] > 0]
    if not len(steered):
        nothing = [None] * len(layers)
        return with_interval(table[:, :, 0]) | {"spread_tokens": nothing, "spread_answers": nothing, "tokens": 0.0}
    return with_interval(steered[:, :, 0]) | {
        "spread_tokens": plain(steered[:, :, 1].mean(0)),
        "spread_answers": plain(steered[:, :, 0].std(0)),
        "tokens": float(steered[:, 0, 2].mean()),
    }


def _by_chance(one: Tensor, other: Tensor) -> float:
    return float(f"{chance_similarity(len(one), len(other), one.shape[1]):.6g}")
