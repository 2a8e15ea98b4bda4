"""The token map of LLaVA-NeXT's splice, and what is recorded of it (tests/golden/next), in its real layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from next_golden import CASES, FAMILIES, FOLDER, IMAGE, is_text
from next_recording import model_of, recorded
from safetensors.torch import load_file
from tiny_llava import TinyLlava

# An image has 4 x 4 tokens. Its tiles have 8 x 8, of which the padding of 100 x 112 pixels goes, and a newline a row;
# they come behind the whole image. A frame is pooled to 2 x 2, with a newline a row.
EXPECTED = {"one image": 17, "anyres_max_9": 16 + 8 * 9, "two images": 34, "video": 3 * 2 * 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_is_what_it_computes_today(family: str, tiny: TinyLlava, patched_llava: Path) -> None:
    here, golden = recorded(family, tiny.tower), load_file(FOLDER / f"{family}.safetensors")
    assert here.keys() == golden.keys()
    for name, value in golden.items():
        torch.testing.assert_close(here[name], value, rtol=0, atol=1e-5 * float(value.float().abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_marks_what_is_no_text_and_as_many_tokens_as_the_layout_has(
    family: str, tiny: TinyLlava, patched_llava: Path
) -> None:
    found = recorded(family, tiny.tower)
    table = model_of(family, tiny.tower).get_input_embeddings().weight
    for case, (ids, _) in CASES.items():
        visual = found[f"{case}/visual"]
        assert torch.equal(visual, ~is_text(found[f"{case}/embeddings"], ids, table)), case
        assert int(visual.sum()) == EXPECTED[case], case
        assert len(visual) == EXPECTED[case] + sum(word != IMAGE for word in ids), case
