"""Which tokens a selection means is the same in vLLM's numbers as everywhere else."""

from __future__ import annotations

import pytest
import torch

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes.mores_selection import TokenSelection
from llava_steering_plugin.vllm.token_table import SELECTIONS, selected, table_of, with_places, without_places

SPECS = ["all", "f4", "l5", "f4+l5", "uniform1", "uniform9", "uniform1000", "1%", "12.5%", "100%", "f9999999999999"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 9, 16, 576, 2880])
def test_every_token_of_an_image_is_selected_as_by_the_flag(length: int, dtype: torch.dtype) -> None:
    marked = with_places(torch.ones(length, 3, dtype=dtype))
    features, digits = without_places(marked)
    assert torch.equal(features, torch.ones(length, 3, dtype=dtype))
    for first in range(0, len(SPECS), SELECTIONS):
        selections = [TokenSelection.parse(spec) for spec in SPECS[first : first + SELECTIONS]]
        bits = selected(table_of(selections).expand(length, -1, -1, -1), digits)
        for number, selection in enumerate(selections):
            expected = selection.mask(torch.ones(1, length, dtype=torch.bool))[0]
            assert torch.equal((bits >> number & 1).bool(), expected), selection.spec


def test_rows_of_several_images_and_adapters_are_told_apart() -> None:
    tables = torch.stack([table_of([TokenSelection.parse(spec)]) for spec in ("f2", "l3")])
    images = [with_places(torch.zeros(length, 1))[:, 1:] for length in (5, 4)]
    pieces = torch.cat([images[0][3:], images[1], images[0][:2]])  # as chunks cut them
    owners = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1])
    assert selected(tables[owners], pieces).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentsError, match="9 different selections"):
        table_of([TokenSelection.parse(f"f{number}") for number in range(1, 10)])
    with pytest.raises(ArgumentsError, match="joins 9 terms"):
        table_of([TokenSelection.parse("+".join(f"uniform{number}" for number in range(1, 10)))])
    with pytest.raises(ArgumentsError, match="too long"):
        with_places(torch.zeros(128**2, 1))
