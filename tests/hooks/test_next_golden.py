"""What LLaVA-NeXT computed (tests/golden/next) comes out of transformers' own classes under its token map.

`tests/support/next_recording.py` recorded it, with llava_llama and llava_qwen; here is no LLaVA-NeXT. tests/next
compares the same files with LLaVA-NeXT itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from next_golden import CASES, FAMILIES, FOLDER, LAST, SIZES, fill, is_text
from safetensors.torch import load_file
from torch import Tensor

from llava_steering_plugin import attach, disable_adapter, token_map


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    """A language model of transformers with MoReS on it, and what LLaVA-NeXT's made of the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    }[request.param]()
    fill(dict(model.named_parameters()))
    fill(attach(model.eval(), "mores", rank=1, tokens="all").trained())
    return model, load_file(FOLDER / f"{request.param}.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_llava_next_and_the_adapter_changes_them(
    family: tuple[Any, dict[str, Tensor]], case: str
) -> None:
    model, golden = family
    embeddings, visual = golden[f"{case}/embeddings"][None], golden[f"{case}/visual"][None]
    expected = golden[f"{case}/logits"]
    largest = float(expected.abs().max())
    with torch.no_grad(), token_map(visual=visual):
        found = model(inputs_embeds=embeddings).logits[0, -LAST:]
        with disable_adapter(model):
            frozen = model(inputs_embeds=embeddings).logits[0, -LAST:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)
    assert float((found - frozen).abs().max()) > 1e-3 * largest


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_map_marks_what_is_no_text(family: tuple[Any, dict[str, Tensor]], case: str) -> None:
    model, golden = family
    text = is_text(golden[f"{case}/embeddings"], CASES[case][0], model.get_input_embeddings().weight)
    assert torch.equal(golden[f"{case}/visual"], ~text)
