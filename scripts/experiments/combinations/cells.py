"""Which combinations there are, which of them are possible, and a selection in which every pair of parts occurs."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations, product

# LLaVA's own, and the components that LLaVA's pin of transformers has.
LANGUAGE_MODELS = ("llama", "phi", "qwen2", "smollm2", "mistral")
# Those that need a newer one: refused here.
NEWER = ("gemma", "phi3", "qwen3", "stablelm")
TOWERS = ("clip", "siglip", "dinov2", "mof", "timm", "efficientnet-lite0")
CONNECTORS = ("identity", "linear", "mlp2x_gelu", "avgpool", "pixel-shuffle", "qformer", "resampler", "mof-mlp")
METHODS = ("mores", "mixlora", "lora")
# What `pairwise` covers. LLaVA's own two simplest connectors are in the whole table alone: with them, the pairs of
# towers and connectors need more than 40 cells.
COVERED = tuple(name for name in CONNECTORS if name not in ("identity", "linear"))


@dataclass(frozen=True, order=True)
class Cell:
    """One combination, by the names of its parts; `method` is a tuning mode or LLaVA's own LoRA."""

    language_model: str
    tower: str
    connector: str
    method: str

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return "+".join(astuple(self))


def all_cells() -> list[Cell]:
    """Return every combination: first each language model, tower and connector with one method, then with the others.

    So the table of a run that was ended says the most.
    """
    parts = list(product(enumerate(TOWERS), enumerate(CONNECTORS), enumerate((*LANGUAGE_MODELS, *NEWER))))
    return [
        Cell(model, tower, connector, METHODS[(i + j + k + turn) % len(METHODS)])
        for turn in range(len(METHODS))
        for (i, tower), (j, connector), (k, model) in parts
    ]


def possible(cell: Cell) -> bool:
    """Tell whether a combination should work, by what the parts are and not by what the package says."""
    if cell.language_model in NEWER:
        return False
    if cell.connector == "mof-mlp":
        return cell.tower == "mof"
    # Only the tiny CLIP is as wide as the tiny language models.
    return cell.connector != "identity" or cell.tower == "clip"


def pairwise(cells: Iterable[Cell], draws: int = 60) -> list[Cell]:
    """Choose cells so that two parts that occur together in any of them do so in a chosen one.

    Greedy: the next cell is one that covers the most pairs that are left. Ties are drawn; of several covers, which are
    the same in every run, the smallest is taken.
    """
    pool = sorted(cells)
    found = [_greedy(pool, random.Random(seed)) for seed in range(draws)]
    return min(found, key=len)


def pairs(cell: Cell) -> set[tuple[tuple[int, str], ...]]:
    """Return the pairs of parts of a cell, each part with its place."""
    return set(combinations(enumerate(astuple(cell)), 2))


def _greedy(pool: Sequence[Cell], rng: random.Random) -> list[Cell]:
    by_cell = {cell: pairs(cell) for cell in pool}
    left: Collection[tuple[tuple[int, str], ...]] = set().union(*by_cell.values())
    chosen = []
    while left:
        order = rng.sample(pool, len(pool))
        best = max(order, key=lambda cell: len(by_cell[cell] & set(left)))
        chosen.append(best)
        left = set(left) - by_cell[best]
    return chosen
