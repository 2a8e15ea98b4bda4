"""MixLoRA on a whole model: one choice for each row, from its prompt, through every way of decoding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from routed import LONG, SHORT, adapted, batch, small_llama
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from llava_steering_plugin import attach, disabled, remove, token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear

NEW = 6


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_llama()


def generate(model: LlamaForCausalLM, *rows: list[int], **how: Any) -> Tensor:
    ids, attention = batch(*rows)
    with token_map(torch.zeros_like(attention, dtype=torch.bool), attention):
        output: Tensor = model.generate(
            ids, attention_mask=attention, max_new_tokens=NEW, pad_token_id=0, **{"do_sample": False, **how}
        )
    return output[:, ids.shape[1] :]


def logits(model: LlamaForCausalLM, ids: Tensor, attention: Tensor, prompt: Tensor | None = None) -> Tensor:
    with torch.no_grad(), token_map(torch.zeros_like(attention, dtype=torch.bool), attention, prompt):
        found: Tensor = model(ids, attention_mask=attention).logits
    return found


@contextmanager
def choices(attachment: Attachment) -> Iterator[list[dict[str, list[list[int]]]]]:
    """For every pass, what each linear's kept choice is: the A factors and the B factors of every row."""
    passes: list[dict[str, list[list[int]]]] = []
    handles = []
    for path, module in attachment.modules.items():

        def note(module: RoutedLinear, args: Any, output: Any, path: str = path) -> None:
            if not passes or path in passes[-1]:
                passes.append({})
            kept = args[2].kept[module]
            passes[-1][path] = torch.cat([kept.a, kept.b], dim=1).tolist()

        handles.append(module.register_forward_hook(note))
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def row_of(choice: dict[str, list[list[int]]], row: int) -> dict[str, list[int]]:
    return {path: rows[row] for path, rows in choice.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_question_gets_the_same_factors_alone_and_in_a_padded_batch(base: LlamaForCausalLM, side: str) -> None:
    with adapted(base) as attachment, choices(attachment) as passes:
        alone = [logits(base, *batch(row)) for row in (SHORT, LONG)]
        ids, attention = batch(SHORT, LONG, side=side)
        together = logits(base, ids, attention)
    for row in (0, 1):
        assert row_of(passes[2], row) == row_of(passes[row], 0)
        torch.testing.assert_close(together[row][attention[row].bool()], alone[row][0], atol=1e-4, rtol=1e-4)
    assert row_of(passes[0], 0) != row_of(passes[1], 0), "the two questions would show nothing"


def test_training_chooses_by_the_tokens_before_the_first_supervised_one(base: LlamaForCausalLM) -> None:
    ids, attention = batch(LONG)
    prompt = torch.arange(len(LONG))[None] < 4
    with adapted(base) as attachment, choices(attachment) as passes:
        logits(base, *batch(LONG[:4]))
        logits(base, ids, attention, prompt)
        logits(base, ids, attention)
    assert passes[1]["layers.0.self_attn.q_proj"] == passes[0]["layers.0.self_attn.q_proj"]
    assert passes[1] == passes[0], "what comes after the prompt cannot change its hidden states"
    assert passes[2] != passes[0]


def test_decoding_with_a_cache_equals_whole_sequences_routed_by_their_prompt(base: LlamaForCausalLM) -> None:
    with adapted(base):
        answer = generate(base, SHORT)[0].tolist()
        for length in range(NEW):
            ids, attention = batch(SHORT + answer[:length])
            prompt = torch.arange(ids.shape[1])[None] < len(SHORT)
            assert int(logits(base, ids, attention, prompt)[0, -1].argmax()) == answer[length]


HOWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "all beams returned": {"num_beams": 3, "num_return_sequences": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_every_decoding_answers_each_row_of_a_batch_as_it_answers_it_alone(
    base: LlamaForCausalLM, how: dict[str, Any]
) -> None:
    # Equally long rows: transformers' contrastive search is not the same with padding, adapter or not.
    rows = [SHORT, LONG[:4], LONG[4:8]]
    with adapted(base):
        alone = [generate(base, row, **how) for row in rows]
        together = generate(base, *rows, **how)
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, generate(base, *rows, **how)), "the adapter would change nothing"


def test_sampling_decides_once_and_keeps_it(base: LlamaForCausalLM) -> None:
    with adapted(base) as attachment, choices(attachment) as passes:
        generate(base, SHORT, LONG, do_sample=True, num_return_sequences=2)
    assert len(passes) == NEW
    assert all(choice == passes[0] for choice in passes)
    assert row_of(passes[0], 0) == row_of(passes[0], 1)
    assert row_of(passes[0], 1) != row_of(passes[0], 2)


class Together(StoppingCriteria):
    """Has generations take turns: none makes another token before all have made theirs."""

    def __init__(self, threads: int):
        self.barrier = threading.Barrier(threads)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.barrier.wait(timeout=60)
        return False


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_threads_with_different_questions_answer_as_alone(base: LlamaForCausalLM, how: dict[str, Any]) -> None:
    questions = [SHORT, LONG, LONG[2:], [3, 1, 4, 1, 5]]
    with adapted(base):
        alone = [generate(base, question, **how) for question in questions]
        together = StoppingCriteriaList([Together(len(questions))])
        with ThreadPoolExecutor(len(questions)) as threads:
            answers = list(
                threads.map(lambda question: generate(base, question, stopping_criteria=together, **how), questions)
            )
    assert len({tuple(answer.flatten().tolist()) for answer in alone}) > 1
    for answer, expected in zip(answers, alone, strict=True):
        assert torch.equal(answer, expected)


def test_a_decode_step_without_its_prefill_is_refused_and_sequence_routing_takes_it(base: LlamaForCausalLM) -> None:
    ids, attention = batch(SHORT)
    visual = torch.zeros_like(attention, dtype=torch.bool)
    new = torch.tensor([[11]])
    with adapted(base), torch.no_grad():
        with token_map(visual, attention):
            cache = base(ids, use_cache=True).past_key_values
        with pytest.raises(TokenMapError, match=r"model\.generate\(\)"):
            base(new, past_key_values=cache)
    with adapted(base, routing="sequence") as attachment, choices(attachment) as passes, torch.no_grad():
        with token_map(visual, attention):
            cache = base(ids, use_cache=True).past_key_values
        base(new, past_key_values=cache)
    assert passes[1] != passes[0], "the released behaviour: by the newest token alone"


def test_disabled_and_removed_it_is_the_base_to_the_bit(base: LlamaForCausalLM) -> None:
    names = {name for name, _ in base.named_parameters()}
    ids, attention = batch(SHORT, LONG)
    frozen = logits(base, ids, attention)
    with adapted(base) as attachment:
        assert not torch.equal(logits(base, ids, attention), frozen)
        with disabled(base):
            assert torch.equal(logits(base, ids, attention), frozen)
        assert names < {name for name, _ in base.named_parameters()}, "the base's own names stay"
        assert "layers.1.mlp.down_proj.router_ab" in attachment.parameters()
    assert torch.equal(logits(base, ids, attention), frozen)
    assert {name for name, _ in base.named_parameters()} == names
    attach(base, MixLoRA())
    assert torch.equal(logits(base, ids, attention), frozen), "a fresh adapter is the identity"
    remove(base)
