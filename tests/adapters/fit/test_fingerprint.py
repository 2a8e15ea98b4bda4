"""An adapter is refused on another base, and taken on its own in another precision (`adapters/fit/fingerprint.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered import base_of, traces

from llava_steering_plugin import load_adapter
from llava_steering_plugin.errors import BaseMismatch

pytest_plugins = ["steered_fixtures"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"num_hidden_layers": 2}, "it was trained on 4 layers of width 64; this model has 2 of width 64"),
        ({"hidden_size": 32}, "this model has 4 of width 32"),
        ({"vocab_size": 300}, "its base has 700 embedding rows; this model has 300"),
        ({}, "same shape, other weights"),
    ],
)
def test_an_adapter_of_another_base(saved: Path, frozen: Any, sizes: dict[str, int], expected: str) -> None:
    other = base_of(**sizes)
    before = traces(other)
    with pytest.raises(BaseMismatch) as error:
        load_adapter(other, saved)
    assert expected in str(error.value)
    assert f"Load it on {frozen.config._name_or_path}" in str(error.value)
    assert "--model-base" in str(error.value)
    assert traces(other) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_another_precision_is_the_same_base(model: Any, saved: Path, dtype: torch.dtype) -> None:
    weight = model.get_input_embeddings().weight
    exact = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(exact.to(dtype))
        try:
            load_adapter(model, saved)
        finally:
            weight.copy_(exact)
