"""Summarise the modality attention of a model: means over answers with bootstrap intervals, for JSON and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

from llava_steering_plugin.diagnostics.intervals import plain, with_interval
from llava_steering_plugin.diagnostics.modality_run import shares_of
from llava_steering_plugin.measures.modality import TEXTS, Kind, Shares


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
        "lmar": {text: _table([shares.ratio(kinds) for shares in measured]) for text, kinds in TEXTS.items()},
        "lmar_by_head": [] if not measured else _by_head(measured),
        "shares": {
            kind.name.lower(): _table([shares.shares[..., kind].mean(1) for shares in measured]) for kind in Kind
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


def _table(values: Sequence[torch.Tensor]) -> dict[str, list[float | None]]:
    """Return the mean over answers [layers] and its bootstrap interval."""
    return with_interval(torch.stack(list(values)).numpy() if values else [])


def _by_head(measured: Sequence[Shares]) -> list[list[float | None]]:
    """Return eq. 2 for each head alone, with all text, [layers][heads]."""
    ratios = []
    text = list(TEXTS["all text"])
    for shares in measured:
        image = shares.shares[..., Kind.IMAGE] / shares.counts[Kind.IMAGE]
        ratios.append(image / (shares.shares[..., text].sum(-1) / sum(shares.counts[kind] for kind in text)))
    return [plain(row) for row in torch.stack(ratios).mean(0).numpy()]
