"""A scope holds for one call: what is steered through every decoding, in threads, and where adapters are disabled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from steered import (
    AFTER,
    BEFORE,
    IMAGE,
    NEW,
    PROMPT,
    TEXT,
    ByHand,
    generate,
    ids_of,
    logits_of,
    mask_of,
    pictures,
    strengthen,
    words,
)
from tiny_llava import VISUAL_TOKENS
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava_steering_plugin import attach, disabled, token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.95},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "several samples returned": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}


# Every way of decoding


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tokens", ["all", "f4+l5"])
def test_every_decoding_steers_as_done_by_hand(
    model: Any, frozen: Any, steered: Steered, strategy: str, tokens: str
) -> None:
    attachment = steered(tokens=tokens, size=1.0)
    ids, images, options = ids_of(PROMPT), pictures(1), STRATEGIES[strategy]
    chosen = mask_of((BEFORE, VISUAL_TOKENS, AFTER))
    if tokens == "f4+l5":
        chosen[:, BEFORE + 4 : BEFORE + VISUAL_TOKENS - 5] = False
    with ByHand(attachment).steering(frozen, chosen):
        expected = generate(frozen, ids, images, **options)
    assert generate(model, ids, images, **options) == expected
    assert generate(frozen, ids, images, **options) != expected, "steering changed nothing; the test would show nothing"


@pytest.mark.parametrize("strategy", ["greedy", "beams", "several samples returned"])
def test_batches_of_unequal_prompts_steer_every_row_at_its_own_image(
    model: Any, frozen: Any, steered: Steered, strategy: str
) -> None:
    attachment = steered()
    ids = ids_of(PROMPT, [0, 0, 1, *words(1), IMAGE, *words(3)])
    attention = (ids != 0).long()
    images = pictures(2)
    chosen = mask_of((BEFORE, VISUAL_TOKENS, AFTER), (4, VISUAL_TOKENS, 3))
    try:
        for each in (model, frozen):
            each.config.tokenizer_padding_side = "left"
        with ByHand(attachment).steering(frozen, chosen):
            expected = generate(frozen, ids, images, attention_mask=attention, **STRATEGIES[strategy])
        assert generate(model, ids, images, attention_mask=attention, **STRATEGIES[strategy]) == expected
    finally:
        frozen.config.tokenizer_padding_side = "right"


def test_decoding_with_a_cache_equals_running_the_whole_sequence_anew_for_every_token(
    model: Any, frozen: Any, steered: Steered
) -> None:
    by_hand = ByHand(steered())
    ids, images = ids_of(PROMPT), pictures(1)
    embed = frozen.get_input_embeddings()
    with torch.inference_mode():
        embeds = frozen.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]
        expected: list[int] = []
        with by_hand.steering(frozen, mask_of((BEFORE, VISUAL_TOKENS, AFTER))):
            for _ in range(NEW):
                logits = frozen(inputs_embeds=embeds, use_cache=False).logits[0, -1].clone()
                logits[2] = -torch.inf
                expected.append(int(logits.argmax()))
                embeds = torch.cat([embeds, embed(ids_of(expected[-1:]))], 1)
    assert generate(model, ids, images, do_sample=False)[0][-NEW:] == expected


def test_a_forward_steers_as_done_by_hand_in_a_mixed_batch_and_leaves_the_text_row_alone(
    model: Any, frozen: Any, steered: Steered
) -> None:
    attachment = steered()
    ids = ids_of([1, IMAGE, *words(2), IMAGE, 300], [1, *words(5)], [1, *words(4), IMAGE])
    images = pictures(4)
    call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "labels": ids.clamp(min=0)}
    spliced = 4 + 2 * VISUAL_TOKENS
    chosen = torch.zeros(3, spliced, dtype=torch.bool)
    chosen[0, 1 : 1 + VISUAL_TOKENS] = chosen[0, 3 + VISUAL_TOKENS : 3 + 2 * VISUAL_TOKENS] = True
    chosen[2, 5 : 5 + VISUAL_TOKENS] = True
    plain = logits_of(frozen, ids, images, **call)
    with ByHand(attachment).steering(frozen, chosen):
        expected = logits_of(frozen, ids, images, **call)
    logits = logits_of(model, ids, images, **call)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits[1], plain[1]), "a text-only sample must come out bit-identical"
    assert not torch.allclose(logits[0], plain[0], atol=1e-2)


# For how long


def test_a_text_prompt_after_an_image_prompt_of_equal_length_is_the_frozen_models(
    model: Any, frozen: Any, steered: Steered
) -> None:
    steered()
    generate(model, ids_of(PROMPT), pictures(1))
    assert generate(model, ids_of(TEXT), None) == generate(frozen, ids_of(TEXT), None)
    logits_of(model, ids_of(PROMPT), pictures(1))
    assert torch.equal(logits_of(model, ids_of(TEXT), None), logits_of(frozen, ids_of(TEXT), None))


class Raises(StoppingCriteria):
    """Ends a generation the hard way, after some tokens."""

    def __init__(self, after: int):
        self.after = after

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        if input_ids.shape[1] >= self.after:
            raise InterruptedError("the user left")
        return False


class Stops(BaseStreamer):
    """A streamer whose reader has gone."""

    def __init__(self) -> None:
        self.left = 3

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise InterruptedError("nobody reads any more")

    def end(self) -> None:
        pass


@pytest.mark.parametrize("ending", ["stopping criterion", "streamer", "in the prefill"])
def test_an_aborted_generation_leaves_nothing_behind(model: Any, frozen: Any, steered: Steered, ending: str) -> None:
    steered()
    options: dict[str, Any] = {}
    breaking = contextlib.ExitStack()
    if ending == "stopping criterion":
        options["stopping_criteria"] = StoppingCriteriaList([Raises(3)])
    elif ending == "streamer":
        options["streamer"] = Stops()
    else:

        def fail(*args: Any) -> None:
            raise InterruptedError("out of memory, say")

        breaking.callback(model.model.layers[2].mlp.register_forward_pre_hook(fail).remove)
    expected = logits_of(frozen, ids_of(TEXT), None)
    with breaking, pytest.raises(InterruptedError):
        generate(model, ids_of(PROMPT), pictures(1), **options)
    assert current() is None
    assert torch.equal(logits_of(model, ids_of(TEXT), None), expected)
    assert generate(model, ids_of(TEXT), None) == generate(frozen, ids_of(TEXT), None)


class Together(StoppingCriteria):
    """Has two generations take turns: neither makes a token before the other is there."""

    def __init__(self, barrier: threading.Barrier):
        self.barrier = barrier

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.barrier.wait(timeout=60)
        return False


def test_two_threads_with_different_images_answer_as_alone(model: Any, frozen: Any, steered: Steered) -> None:
    steered()
    # Equal lengths and different places of the image: a map of the other thread would fit, and be wrong.
    prompts = [PROMPT, [1, IMAGE, *words(BEFORE + AFTER - 1, seed=3)]]
    images = [pictures(1, seed=1), pictures(1, seed=2)]
    alone = [generate(model, ids_of(prompt), image) for prompt, image in zip(prompts, images, strict=True)]
    text_alone = generate(frozen, ids_of(TEXT), None)
    assert alone[0] != alone[1]

    def pair(first: Callable[..., Any], second: Callable[..., Any]) -> list[Any]:
        barrier = threading.Barrier(2)
        options = {"stopping_criteria": StoppingCriteriaList([Together(barrier)]), "do_sample": False}
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(work, **options) for work in (first, second)]
            return [answer.result(timeout=120) for answer in answers]

    def asking(number: int) -> Callable[..., Any]:
        return lambda **options: generate(model, ids_of(prompts[number]), images[number], **options)

    def asking_without_image(**options: Any) -> Any:
        return generate(model, ids_of(TEXT), None, **options)

    assert pair(asking(0), asking(1)) == alone
    assert pair(asking(1), asking_without_image) == [alone[1], text_alone]


def test_a_generation_in_a_thread_of_its_own_is_steered_as_the_model_worker_does_it(
    model: Any, steered: Steered
) -> None:
    steered()
    expected = generate(model, ids_of(PROMPT), pictures(1))
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(generate(model, ids_of(PROMPT), pictures(1))))
    thread.start()
    thread.join(timeout=60)
    assert answers == [expected]


# Switched off for a while


def test_disabled_is_the_frozen_model_also_nested_and_only_inside_the_block(
    model: Any, frozen: Any, steered: Steered
) -> None:
    steered()
    ids, images = ids_of(PROMPT), pictures(1)
    on, off = logits_of(model, ids, images), logits_of(frozen, ids, images)
    assert not torch.equal(on, off)
    with disabled(model):
        with disabled(model):
            assert torch.equal(logits_of(model, ids, images), off)
        assert torch.equal(logits_of(model, ids, images), off)
        assert generate(model, ids, images) == generate(frozen, ids, images)
        with ThreadPoolExecutor(1) as thread:
            assert torch.equal(thread.submit(logits_of, model, ids, images).result(), on), "only in its own thread"
    assert torch.equal(logits_of(model, ids, images), on)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, ids, images), on)


def test_disabled_and_token_map_nest_either_way(model: Any, frozen: Any, steered: Steered) -> None:
    steered()
    visual = mask_of((2, 4, 2))
    embeds = torch.randn(1, 8, model.config.hidden_size)
    with torch.inference_mode():
        off = frozen(inputs_embeds=embeds).logits
        with token_map(visual):
            on = model(inputs_embeds=embeds).logits
            with disabled(model):
                assert torch.equal(model(inputs_embeds=embeds).logits, off)
            assert torch.equal(model(inputs_embeds=embeds).logits, on)
        with disabled(model):
            assert torch.equal(model(inputs_embeds=embeds).logits, off), "needs no map while it is off"
            with token_map(visual):
                assert torch.equal(model(inputs_embeds=embeds).logits, off)
    assert not torch.equal(on, off)


def test_two_models_do_not_see_each_others_images(model: Any, frozen: Any, steered: Steered) -> None:
    steered()
    text_only = LlamaForCausalLM(LlamaConfig(vocab_size=700, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
    attachment = strengthen(attach(text_only, MoReS(tokens="all")))
    embeds = torch.randn(1, len(TEXT), 64)

    class Asks(StoppingCriteria):
        """Calls the other model in the middle of a generation, with hidden states as long as the prompt."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            with pytest.raises(TokenMapError, match="it is unknown which positions are visual"):
                text_only(inputs_embeds=embeds)
            return False

    expected = generate(model, ids_of(PROMPT), pictures(1))
    assert generate(model, ids_of(PROMPT), pictures(1), stopping_criteria=StoppingCriteriaList([Asks()])) == expected
    attachment.remove()
