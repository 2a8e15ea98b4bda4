"""Summarise the modality attention of a model: means over answers with bootstrap intervals, for JSON and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
from torch import Tensor

from llava_steering_plugin.diagnostics.intervals import plain, with_interval
from llava_steering_plugin.diagnostics.modality.one_model import shares_of
from llava_steering_plugin.measures.modality import TEXTS, Kind, Shares

ABOUT_NO_IMAGE = "about no image"
ALL = "all text"
QUANTITIES = ("lmar", "shares")
VALUES = ("mean", "low", "high")


def summarise_model(
    name: str, about: Mapping[str, Any], records: Iterable[Mapping[str, Any]], text_only: int, *, per_head: bool = False
) -> dict[str, Any]:
    """Return the summary of one model's measurements, ready for JSON.

    Values by layer are lists of [layers] numbers, those by head of [layers][heads]. An interval is null where fewer
    than two answers were measured.

    Args:
        about: what is known of the model: kind, path, base.
        records: its measurements, which are gone through once.
        text_only: how many questions are about no image.
        per_head: also give each head's ratios and shares with their intervals.
    """
    measured: list[Shares] = []
    reasons: Counter[str] = Counter({ABOUT_NO_IMAGE: text_only})
    for record in records:
        shares = shares_of(record)
        if shares is None:
            reasons[str(record["left_out"])] += 1
        else:
            measured.append(shares)
    ratios = _stacked(each.ratios(TEXTS[ALL]) for each in measured)
    by_head = {"per_head": _quantities(measured, heads=True)} if per_head else {}
    return {
        "name": name,
        **about,
        "answers": len(measured),
        "left_out": dict(reasons),
        **_quantities(measured, heads=False),
        "lmar_by_head": [plain(layer) for layer in ratios.mean(0)] if measured else [],
        **by_head,
        "tokens": {
            kind.name.lower(): float(numpy.mean([shares.counts[kind] for shares in measured])) if measured else None
            for kind in Kind
        },
    }


def notes_on(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each model some of whose questions are left out."""
    notes = []
    for model in summaries:
        left_out = [f"{count} ({reason})" for reason, count in model["left_out"].items() if count]
        if left_out:
            notes.append(f"{model['name']}: {model['answers']} measured; left out: {', '.join(left_out)}")
    return notes


def modality_rows(models: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Yield the rows of modality.csv, the heading first.

    There is one for each model, layer and quantity, one for each head where there are values by head, and one for each
    reason why questions were left out, with their number.
    """
    yield ["model", "layer", "head", "quantity", "of", "mean", "low", "high", "answers"]
    for model in models:
        name, answers = model["name"], model["answers"]
        for quantity in QUANTITIES:
            for what, values in model[quantity].items():
                for layer, numbers in enumerate(zip(*(values[each] for each in VALUES), strict=True)):
                    yield [name, layer, "", quantity, what, *numbers, answers]
            for what, values in model.get("per_head", {}).get(quantity, {}).items():
                for layer, heads in enumerate(zip(*(values[each] for each in VALUES), strict=True)):
                    for head, numbers in enumerate(zip(*heads, strict=True)):
                        yield [name, layer, head, quantity, what, *numbers, answers]
        for reason, count in model["left_out"].items():
            yield [name, "", "", "left out", reason, count, "", "", answers]


def _quantities(measured: Sequence[Shares], *, heads: bool) -> dict[str, Any]:
    """Return ratios and shares with their intervals, for layers or for heads."""

    def ratio(shares: Shares, kinds: Collection[Kind]) -> Tensor:
        return shares.ratios(kinds) if heads else shares.ratio(kinds)

    def share(shares: Shares, kind: Kind) -> Tensor:
        return shares.shares[..., kind] if heads else shares.shares[..., kind].mean(1)

    return {
        "lmar": {text: _with_interval(ratio(each, kinds) for each in measured) for text, kinds in TEXTS.items()},
        "shares": {kind.name.lower(): _with_interval(share(each, kind) for each in measured) for kind in Kind},
    }


def _with_interval(values: Iterable[Tensor]) -> dict[str, Any]:
    """Return the mean over answers and its bootstrap interval, of numbers [layers] or [layers, heads] each."""
    table = _stacked(values)
    found = with_interval(table.reshape(len(table), -1) if table.ndim > 1 else table)
    if table.ndim < 3:
        return found
    heads = table.shape[2]
    return {
        each: [numbers[start : start + heads] for start in range(0, len(numbers), heads)]
        for each, numbers in found.items()
    }


def _stacked(values: Iterable[Tensor]) -> Any:
    """Return float64 [answers, ...]."""
    return numpy.array([value.numpy() for value in values], dtype=numpy.float64)
