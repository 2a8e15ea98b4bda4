from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from steered import IMAGE, ByHand, ids_of, pictures, strengthen, words
from tiny_llava import VISUAL_TOKENS
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava_steering_plugin import attach, disabled, token_map
from llava_steering_plugin.adapters.attach import Attachment
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]

NEW = 6  # tokens generated in each test
# A prompt with its picture after 3 pieces, and 4 pieces behind it.
BEFORE, AFTER = 3, 4
PROMPT = [1, *words(BEFORE - 1), IMAGE, *words(AFTER, seed=1)]
TEXT = [1, *words(BEFORE + VISUAL_TOKENS + AFTER - 1, seed=2)]  # as long as PROMPT once its picture is spliced in

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.95},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "several samples returned": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}


def mask_of(*rows: tuple[int, int, int]) -> Tensor:
    """bool [rows, positions]; each row is (before, visual, after)."""
    masks = [
        torch.tensor([0] * before + [1] * visual + [0] * after, dtype=torch.bool) for before, visual, after in rows
    ]
    return torch.stack(masks)


def generate(model: Any, ids: Tensor, images: Tensor | None, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.inference_mode():
        return model.generate(ids, images=images, use_cache=True, **(length | options)).tolist()


def logits_of(model: Any, ids: Tensor, images: Tensor | None, **rest: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, images=images, **rest).logits


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
            with pytest.raises(TokenMapError, match="nobody said which positions are visual"):
                text_only(inputs_embeds=embeds)
            return False

    expected = generate(model, ids_of(PROMPT), pictures(1))
    assert generate(model, ids_of(PROMPT), pictures(1), stopping_criteria=StoppingCriteriaList([Asks()])) == expected
    attachment.remove()


# Models that are no LLaVA


def small_llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**(sizes | {"num_attention_heads": 4, "initializer_range": 0.3} | settings))
    ).eval()


def test_a_token_map_steers_a_model_that_is_no_llava_also_through_generate() -> None:
    model = small_llama()
    plain = copy.deepcopy(model)
    attachment = strengthen(attach(model, MoReS(tokens="all")), size=1.0)
    embeds = torch.randn(2, 9, 32)
    visual = mask_of((2, 5, 2), (4, 3, 2))
    attention = torch.ones(2, 9).long()
    attention[1, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": attention, "num_beams": 2}
    with ByHand(attachment).steering(plain, visual), torch.inference_mode():
        expected = plain(inputs_embeds=embeds, attention_mask=attention).logits
        beams = plain.generate(inputs_embeds=embeds, **options)
    with token_map(visual, attention), torch.inference_mode():
        logits = model(inputs_embeds=embeds, attention_mask=attention).logits
        assert torch.equal(model.generate(inputs_embeds=embeds, **options), beams)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain.generate(inputs_embeds=embeds, **options), beams)


def test_a_model_that_is_no_llava_is_refused_without_a_map() -> None:
    model = small_llama()
    attach(model, "mores")
    for call in (
        lambda: model(input_ids=ids_of([1, 2, 3])),
        lambda: model(inputs_embeds=torch.randn(1, 3, 32)),
        lambda: model.generate(ids_of([1, 2, 3]), max_new_tokens=2),
    ):
        with pytest.raises(TokenMapError, match="token_map"):
            call()
    with pytest.raises(TokenMapError, match="called on its own"):
        model.model(input_ids=ids_of([1, 2, 3]))
    assert current() is None


# Maps that do not fit


def test_ready_made_embeddings_without_a_map_are_refused_with_what_to_do(model: Any, steered: Steered) -> None:
    steered()
    with pytest.raises(TokenMapError, match="Pass input_ids and images, or wrap the call"):
        model(inputs_embeds=torch.randn(1, 5, model.config.hidden_size))


@pytest.mark.parametrize("shape", [(1, 8), (2, 7), (4, 8)])
def test_a_map_of_another_shape_is_an_error_and_never_a_silent_skip(
    model: Any, steered: Steered, shape: tuple[int, int]
) -> None:
    steered()
    visual = torch.zeros(shape, dtype=torch.bool)
    with token_map(visual), pytest.raises(TokenMapError, match=r"describes \[\d, \d\] .* are \[2, 8\]"):
        model(inputs_embeds=torch.randn(2, 8, model.config.hidden_size))


def test_generated_rows_that_are_no_multiple_of_the_maps_are_refused() -> None:
    model = small_llama()
    attach(model, "mores")
    with token_map(torch.zeros(2, 4, dtype=torch.bool)), pytest.raises(TokenMapError, match="no multiple"):
        model.generate(inputs_embeds=torch.randn(3, 4, 32), max_new_tokens=2)


def test_a_prefill_in_chunks_is_refused(model: Any, steered: Steered) -> None:
    steered()
    cache = model(input_ids=ids_of(PROMPT), images=pictures(1), use_cache=True).past_key_values
    with pytest.raises(TokenMapError, match="chunked prefills"):
        model(input_ids=ids_of(words(3)), past_key_values=cache, attention_mask=torch.ones(1, len(TEXT) + 3))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"visual": torch.zeros(3)}, "one shape"),
        ({"visual": torch.zeros(1, 3), "attention": torch.ones(1, 4)}, "one shape"),
        ({"visual": torch.zeros(1, 3), "prompt": torch.ones(2, 3)}, "one shape|broadcast"),
        ({"visual": torch.ones(1, 3), "attention": torch.tensor([[1, 1, 0]])}, "padding"),
    ],
)
def test_bad_masks_are_refused_before_any_model_is_called(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TokenMapError, match=message), token_map(**masks):
        pass


# Gradients


def train_setup(model: Any, checkpointing: str) -> None:
    model.train()
    model.requires_grad_(False)
    for parameter in model.llava_steering.parameters().values():
        parameter.requires_grad_(True)
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()


def train_teardown(model: Any) -> None:
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


def batch_of(seed: int, *, text_only: bool = False) -> dict[str, Any]:
    """Two rows of different lengths, the image of each elsewhere; the second has none for odd seeds."""
    rows = [
        [1, *words(2, seed), IMAGE, *words(5, seed + 1)],
        [1, *words(6, seed + 2)] if seed % 2 else [1, IMAGE, *words(4, seed + 2), 300],
    ]
    if text_only:
        rows = [[1, *words(8, seed)], [1, *words(6, seed + 2)]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((ids == 0) | (ids == IMAGE), -100)
    labels[:, :3] = -100
    images = None if text_only else pictures(2, seed)
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": labels, "images": images}


def one_step(model: Any) -> None:
    model(**batch_of(0)).loss.backward()


def two_forwards_then_two_backwards(model: Any) -> None:
    losses = [model(**batch_of(seed)).loss for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def accumulation(model: Any) -> None:
    for seed in (0, 1, 2):
        (model(**batch_of(seed)).loss / 3).backward()


def generation_between_forward_and_backward(model: Any) -> None:
    loss = model(**batch_of(0)).loss
    model.eval()
    generate(model, ids_of(PROMPT), pictures(1))
    model.train()
    loss.backward()


def text_between_forward_and_backward(model: Any) -> None:
    losses = [model(**batch_of(0)).loss, model(**batch_of(0, text_only=True)).loss]
    for loss in losses:
        loss.backward()


def backward_in_another_thread(model: Any) -> None:
    loss = model(**batch_of(0)).loss
    with ThreadPoolExecutor(1) as thread:
        thread.submit(loss.backward).result()


def disabled_then_enabled(model: Any) -> None:
    with disabled(model):
        off = model(**batch_of(0)).loss
    on = model(**batch_of(1)).loss
    (on + off).backward()


RUNS = (
    one_step,
    two_forwards_then_two_backwards,
    accumulation,
    generation_between_forward_and_backward,
    text_between_forward_and_backward,
    backward_in_another_thread,
    disabled_then_enabled,
)


def gradients(model: Any, run: Callable[[Any], None], checkpointing: str) -> dict[str, Tensor]:
    train_setup(model, checkpointing)
    try:
        run(model)
        parameters = model.llava_steering.parameters()
        assert all(parameter.grad is not None for parameter in parameters.values())
        found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        model.zero_grad(set_to_none=True)
        return found
    finally:
        train_teardown(model)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run(
    model: Any, steered: Steered, run: Callable[[Any], None], checkpointing: str
) -> None:
    steered(tokens="f4+l5", modality="vis+text")
    plain = gradients(model, run, "off")
    again = gradients(model, run, checkpointing)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-6 or ".3.vis" in name or name.startswith("layers.3"), name
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-6, msg=name)


def test_the_plain_runs_gradients_are_those_of_the_formula(model: Any, frozen: Any, steered: Steered) -> None:
    attachment = steered(modality="vis")
    weights = attachment.parameters()["layers.0.vis.steer_shift"]
    plain = gradients(model, one_step, "off")["layers.0.vis.steer_shift"]
    # Central differences along the gradient itself.
    direction = plain / plain.norm()
    losses = []
    with torch.no_grad():
        for step in (1e-2, -1e-2):
            weights.add_(direction, alpha=step)
            losses.append(float(model(**batch_of(0)).loss))
            weights.sub_(direction, alpha=step)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(plain.norm()), rel=0.05)


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "not reentrant"])
@pytest.mark.parametrize("modality", ["vis", "text", "vis+text"])
def test_text_only_batch_is_untouched_and_still_gives_every_parameter_a_gradient(
    model: Any, frozen: Any, steered: Steered, checkpointing: str, modality: str
) -> None:
    attachment = steered(modality=modality)
    batch = batch_of(0, text_only=True)
    with torch.no_grad():
        expected = frozen(**batch)
    train_setup(model, checkpointing)
    try:
        output = model(**batch)
        assert torch.equal(output.logits, expected.logits)
        output.loss.backward()
    finally:
        train_teardown(model)
    for name, parameter in attachment.parameters().items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_and_leave_text_bit_identical(frozen: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(frozen).to(dtype)
    plain = copy.deepcopy(model)
    attachment = strengthen(attach(model, MoReS(rank=4, tokens="all")))
    assert {parameter.dtype for parameter in attachment.parameters().values()} == {torch.float32}
    train_setup(model, "reentrant")
    batch = batch_of(1) | {"images": pictures(2).to(dtype)}
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    with torch.no_grad():
        assert torch.equal(output.logits[1], plain(**batch).logits[1])
    for name, parameter in attachment.parameters().items():
        assert torch.isfinite(parameter.grad).all(), name
