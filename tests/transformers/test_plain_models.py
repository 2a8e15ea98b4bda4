"""Plain language models of transformers 5: the cache has another name there, and trainers replace `forward`."""

from __future__ import annotations

import pytest
import torch
from routed import LONG, SHORT, batch, small_llama
from steered import strengthen

from llava_steering_plugin import attach, token_map
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.modes.mores import MoReS

IDS, ATTENTION = batch(SHORT, LONG)
VISUAL = ATTENTION.bool() & (torch.arange(IDS.shape[1]) < 7)


def test_a_generation_has_decode_steps_of_one_token() -> None:
    model = small_llama()
    assert family_of(model).name == "told"
    strengthen(attach(model, MoReS(rank=2, tokens="all")))
    with token_map(VISUAL, ATTENTION):
        found = model.generate(IDS, attention_mask=ATTENTION, max_new_tokens=4, do_sample=False)
    ids, attention, seen = IDS, ATTENTION, VISUAL
    for _ in range(4):
        with token_map(seen, attention), torch.no_grad():
            following = model(ids, attention_mask=attention).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
        attention = torch.cat([attention, torch.ones_like(following)], 1)
        seen = torch.cat([seen, torch.zeros_like(following, dtype=torch.bool)], 1)
    assert torch.equal(found, ids)


@pytest.mark.slow
def test_a_compiled_model_answers_as_it_does_uncompiled() -> None:
    model = small_llama()
    strengthen(attach(model, MoReS(rank=2, tokens="f4+l5")))
    with token_map(VISUAL, ATTENTION), torch.no_grad():
        expected = model(IDS, attention_mask=ATTENTION).logits
        found = torch.compile(model, backend="eager")(IDS, attention_mask=ATTENTION).logits
    assert torch.equal(found, expected)
