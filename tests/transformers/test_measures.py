"""The measures of both papers, on transformers' own classes: Python functions over hooks (`measures/`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from placeholders import KINDS, Kind, labelled, visual
from steered import strengthen

from llava_steering_plugin import attach, attachment_of
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.measures import modality, routing, steering
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

PROMPT, IMAGE = int(modality.Kind.PROMPT), int(modality.Kind.IMAGE)


def made(kind: str, mode: Mode) -> Kind:
    found = KINDS[kind]()
    strengthen(attach(found.model, mode), size=0.1)
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_attention_is_read_alike_from_fused_kernels_and_in_the_open(kind: str) -> None:
    shares: dict[str, torch.Tensor] = {}
    for how in ("sdpa", "eager"):
        found = made(kind, MoReS(rank=2, tokens="all"))
        found.model.set_attn_implementation(how)
        batch = labelled(found.batch())
        tokens = family_of(found.model).tokens((), batch)
        assert tokens is not None and torch.equal(tokens.visual, visual(batch))
        kinds = modality.kinds_in_training(tokens, batch["labels"], torch.zeros(2, dtype=torch.bool))
        in_training = modality.measure_shares(found.model, lambda m=found.model, b=batch: m(**b), kinds)

        asked = found.batch()
        prompt = torch.full(asked["input_ids"].shape, modality.PADDING)
        prompt[asked["attention_mask"].bool()] = PROMPT
        prompt[visual(asked)] = IMAGE
        # Several heads share a key here; transformers packs them at decode steps.
        generated = modality.GenerationShares(found.model, lambda p=prompt: p)
        with generated.watching():
            found.model.generate(**asked, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert generated.whole
        answers = [each.shares for each in [*in_training, generated.of(0, 3), generated.of(1, 3)]]
        assert all(torch.allclose(each.sum(-1), torch.ones(()).double(), atol=1e-5) for each in answers)
        shares[how] = torch.stack(answers)
    torch.testing.assert_close(shares["sdpa"], shares["eager"], atol=1e-5, rtol=1e-4)


def test_updates_and_choices_are_measured() -> None:
    found = made("Llava", MoReS(rank=2, tokens="all"))
    with steering.watched_norms(steering.steerings(_modules(found.model))) as norms:
        found.model(**found.batch())
    assert all(len(torch.cat(each.values)) == 2 * found.features for each in norms.values())

    found = made("Qwen2.5-VL", MixLoRA(factors=8, rank=2))
    linears = routing.routed_linears(_modules(found.model))
    with routing.watched_choices(linears, []) as rows:
        found.model(**found.batch())
    assert len(rows) == 2 and len(rows[0]) == len(linears) * len(routing.SIDES)


def _modules(model: Any) -> dict[str, torch.nn.Module]:
    found = attachment_of(model)
    assert found is not None
    return found.modules
