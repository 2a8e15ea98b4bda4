"""Summarise the modality attention of a model: means over answers with bootstrap intervals, for JSON and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from scipy import stats

from llava_steering_plugin.diagnostics.modality_run import shares_of
from llava_steering_plugin.measures.modality import TEXTS, Kind, Shares

CONFIDENCE = 0.95
RESAMPLES = 2_000


def summarise_model(
    name: str, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], text_only: int
) -> dict[str, Any]:
    """Return the summary of one model's measurements, ready for JSON.

    Values by layer are lists of [layers] numbers. An interval is null where fewer than two answers were measured.

    Args:
        about: what is known of the model: kind, path, base.
        records: its measurements.
        text_only: how many questions are about no image.
    """
    measured = [shares for record in records if (shares := shares_of(record)) is not None]
    reasons = Counter(str(record["left_out"]) for record in records if "left_out" in record)
    return {
        "name": name,
        **about,
        "answers": len(measured),
        "left_out": {"about no image": text_only, **reasons},
        "lmar": {text: _with_interval([shares.ratio(kinds) for shares in measured]) for text, kinds in TEXTS.items()},
        "lmar_by_head": [] if not measured else _by_head(measured),
        "shares": {
            kind.name.lower(): _with_interval([shares.shares[..., kind].mean(1) for shares in measured])
            for kind in Kind
        },
        "tokens": {
            kind.name.lower(): float(numpy.mean([shares.counts[kind] for shares in measured])) if measured else None
            for kind in Kind
        },
    }


def modality_rows(models: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Yield the rows of modality.csv, the heading first: one for each model, layer and quantity."""
    yield ["model", "layer", "quantity", "of", "mean", "low", "high", "answers"]
    for model in models:
        for quantity in ("lmar", "shares"):
            for what, values in model[quantity].items():
                rows = zip(values["mean"], values["low"], values["high"], strict=True)
                for layer, (mean, low, high) in enumerate(rows):
                    yield [model["name"], layer, quantity, what, mean, low, high, model["answers"]]


def _with_interval(values: Sequence[torch.Tensor]) -> dict[str, list[float | None]]:
    """Return the mean over answers [layers] and its bootstrap interval."""
    if not values:
        return {"mean": [], "low": [], "high": []}
    table = torch.stack(list(values)).numpy()
    mean = _plain(table.mean(0))
    if len(table) < 2:
        return {"mean": mean, "low": [None] * len(mean), "high": [None] * len(mean)}
    found = stats.bootstrap(
        (table,),
        numpy.mean,
        axis=0,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=100,
        random_state=numpy.random.default_rng(0),
    ).confidence_interval
    return {"mean": mean, "low": _plain(found.low), "high": _plain(found.high)}


def _by_head(measured: Sequence[Shares]) -> list[list[float | None]]:
    """Return eq. 2 for each head alone, with all text, [layers][heads]."""
    ratios = []
    text = list(TEXTS["all text"])
    for shares in measured:
        image = shares.shares[..., Kind.IMAGE] / shares.counts[Kind.IMAGE]
        ratios.append(image / (shares.shares[..., text].sum(-1) / sum(shares.counts[kind] for kind in text)))
    return [_plain(row) for row in torch.stack(ratios).mean(0).numpy()]


def _plain(values: Any) -> list[float | None]:
    """Return numbers as JSON has them: null for those that are not defined."""
    return [float(f"{value:.6g}") if numpy.isfinite(value) else None for value in numpy.asarray(values)]
