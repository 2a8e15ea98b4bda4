"""Attention to patches is the model's own, sinks are told from what an answer looks at, and updates find their patches.

Module: measures/patches.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered import AFTER, BEFORE, PROMPT, ids_of, load_llava, logits_of, pictures, strengthen
from tiny_llava import VISUAL_TOKENS, TinyLlava

from llava_steering_plugin import attach, remove
from llava_steering_plugin.measures.patches import SINK, find_sinks, measure_attention, watched_updates
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture(scope="module")
def model(tiny: TinyLlava, patched_llava: Path) -> Any:
    return load_llava(tiny.llava)


def test_attention_to_patches_is_that_which_the_model_gives_out(model: Any) -> None:
    queries = torch.arange(BEFORE + VISUAL_TOKENS + AFTER) >= BEFORE + VISUAL_TOKENS
    keys = torch.arange(BEFORE, BEFORE + VISUAL_TOKENS)
    forward = lambda: logits_of(model, ids_of(PROMPT), pictures(1))  # noqa: E731
    attention, logits = measure_attention(model, forward, queries, keys)
    assert attention.shape == (4, AFTER, VISUAL_TOKENS)
    with torch.inference_mode():
        output = model(input_ids=ids_of(PROMPT), images=pictures(1), output_attentions=True)
    for layer, weights in zip(attention, output.attentions, strict=True):
        expected = weights[0].double().mean(0)[queries][:, keys]
        torch.testing.assert_close(layer, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logits, output.logits, rtol=1e-4, atol=1e-4)


def test_a_sink_takes_attention_from_every_word_of_the_answer_and_most_of_the_question() -> None:
    answer = torch.full((2, 9), 0.01)
    question = torch.full((5, 9), 0.01)
    answer[:, 0] = question[:, 0] = 0.01 * SINK * 1.1  # a sink
    answer[0, 1] = question[:, 1] = 0.5  # one word of the answer does not look there
    answer[:, 2] = question[:2, 2] = 0.5  # the answer looks there, and few words of the question
    answer[:, 3] = question[:, 3] = 0.01 * SINK * 0.9  # more than others, but not by far
    assert find_sinks(answer, question).nonzero().flatten().tolist() == [0]
    question[2, 2] = 0.5  # now most of the question's words too
    assert find_sinks(answer, question).nonzero().flatten().tolist() == [0, 2]
    assert find_sinks(answer, question[:0]).nonzero().flatten().tolist() == [0, 2]  # no text after the image


@pytest.mark.parametrize("tokens", ["all", "uniform5", "f2"])
def test_updates_lie_at_the_patches_that_change(model: Any, tokens: str) -> None:
    attachment = strengthen(attach(model, MoReS(rank=2, tokens=tokens, layers="1,3")))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, path=path: seen.update({path: (args[0].clone(), output)}))
        for path, module in attachment.modules.items()
    ]
    try:
        with watched_updates(attachment.modules) as updates:
            logits_of(model, ids_of(PROMPT), pictures(1))
        assert list(updates.by_layer) == list(seen) == ["layers.1", "layers.3"]
        for path, (positions, norms) in updates.by_layer.items():
            before, after = (each[0].double() for each in seen[path])
            moved = (after - before).norm(dim=-1)
            assert positions.tolist() == moved.nonzero().flatten().tolist()
            expected = (moved / before.norm(dim=-1))[positions]
            torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6)
    finally:
        for handle in handles:
            handle.remove()
        remove(model)


def test_an_adapter_that_steers_no_patches_has_no_updates(model: Any) -> None:
    attachment = strengthen(attach(model, MoReS(rank=2, tokens="all", modality="text")))
    try:
        with watched_updates(attachment.modules) as updates:
            logits_of(model, ids_of(PROMPT), pictures(1))
        assert updates.by_layer == {}
    finally:
        remove(model)
