"""Recognises the base that an adapter was trained on by its dimensions and some embedding rows."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_steering_plugin.adapters.parameters import shape_of
from llava_steering_plugin.adapters.stored.folder import FINGERPRINT, StoredAdapter
from llava_steering_plugin.distributed import gathered
from llava_steering_plugin.errors import AdapterError, BaseMismatch, listing
from llava_steering_plugin.hooks.families import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# How many embedding rows identify a base, and how many of their columns: 4 KB that tell any two models apart.
FINGERPRINT_ROWS, FINGERPRINT_COLUMNS = 16, 64
# Training loads bfloat16 (8 bits of mantissa), serving float16.
FINGERPRINT_TOLERANCE = 1e-2


def fingerprint_rows(count: int) -> Tensor:
    """Return the numbers of the rows, of `count`, by which a base is recognised: evenly spaced; int64."""
    # float32 whatever the default dtype: float16 does not hold the numbers of a vocabulary.
    return torch.linspace(0, count - 1, min(FINGERPRINT_ROWS, count), dtype=torch.float32).long()


def check_base(model: PreTrainedModel, stored: StoredAdapter) -> None:
    """Compare the model with what the adapter knows of its base: dimensions, vocabulary, some embedding rows.

    The rows are compared where they have been read; an adapter whose tensors are on the meta device has none yet.

    Raises:
        AdapterError: the adapter does not know its base.
        BaseMismatch: `model` is another base.
    """
    base, config = stored.config.base, text_config(model.config)
    here = (int(config.num_hidden_layers), int(config.hidden_size))
    problems = []
    if here != (base.num_layers, base.hidden_size):
        problems.append(
            f"it was trained on {base.num_layers} layers of width {base.hidden_size}; "
            f"this model has {here[0]} of width {here[1]}"
        )
    weight = model.get_input_embeddings().weight
    ids, rows = stored.tensors.get(FINGERPRINT + "ids"), stored.tensors.get(FINGERPRINT + "rows")
    if ids is None or rows is None or rows.dim() != 2 or len(rows) != len(ids) or not rows.numel():
        raise AdapterError(
            f"{stored.path} has no whole fingerprint of its base, so it cannot be checked; the file is damaged."
        )
    read = not (ids.is_meta or rows.is_meta)
    with gathered([weight]) if read else nullcontext():
        if read and int(ids.max()) >= shape_of(weight)[0]:
            problems.append(f"its base has {base.vocab_size} embedding rows; this model has {shape_of(weight)[0]}")
        elif read and not problems and not alike(weight.detach()[ids.to(weight.device), : rows.shape[1]].cpu(), rows):
            problems.append("the embedding rows that identify the base differ: same shape, other weights")
    if problems:
        where = getattr(model.config, "_name_or_path", "") or type(model).__name__
        raise BaseMismatch(
            listing(
                f"the adapter in {stored.path} does not belong to {where}. Load it on {base.name_or_path} "
                "(chat and LLaVA's programs: --model-base, if it has moved)",
                problems,
            )
        )


def alike(here: Tensor, there: Tensor) -> bool:
    """Tell whether two tensors are equal but for the rounding of half precision."""
    if here.shape != there.shape:
        return False
    if not here.numel():
        return True
    here, there = here.float(), there.float()
    floor = FINGERPRINT_TOLERANCE * float(there.abs().mean())
    if not math.isfinite(floor):  # values above those of float32, beside which everything would be alike
        return False
    return torch.allclose(here, there, rtol=FINGERPRINT_TOLERANCE, atol=floor)
