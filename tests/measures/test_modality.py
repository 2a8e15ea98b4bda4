"""The layer-wise modality attention ratio is the paper's, worked out by hand and from whole attention matrices.

Modules: measures/modality.py, measures/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steered import IMAGE as IMAGE_MARK
from steered import NEW, generate, load_llava, pictures, strengthen, words
from tiny_llava import VISUAL_TOKENS, TinyLlava
from torch import Tensor, nn
from torch.nn import functional

from llava_steering_plugin import AdapterPool, attach, remove, token_map
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.hooks.token_map import TokenMap
from llava_steering_plugin.measures.attention import CHUNK, attention_taken
from llava_steering_plugin.measures.modality import (
    PADDING,
    TEXTS,
    GenerationShares,
    Kind,
    Shares,
    answer_queries,
    kinds_in_training,
    lmar,
    measure_shares,
)
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

FIRST, SYSTEM, PROMPT, IMAGE, ANSWER = Kind


def kinds_of(*rows: list[tuple[int, int]]) -> Tensor:
    """Each row as (kind, count) pairs."""
    return torch.tensor([[kind for kind, count in row for _ in range(count)] for row in rows])


LEFT = [(PADDING, 4), (FIRST, 1), (SYSTEM, 2), (IMAGE, 9), (PROMPT, 3), (ANSWER, 4)]
RIGHT = [(FIRST, 1), (PROMPT, 2), (IMAGE, 6), (PROMPT, 1), (IMAGE, 6), (PROMPT, 1), (ANSWER, 2), (PADDING, 4)]


class OneLayer(nn.Module):
    """A decoder of one layer and one head whose weights are given."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 1, "hidden_size": 2})()
        self.layers = nn.ModuleList([nn.Identity()])
        self.layers[0].forward = lambda logits: functional.softmax(logits, dim=-1)  # type: ignore[method-assign]
        self.logits = weights.log()[None, None]

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self) -> Tensor:
        return self.layers[0](self.logits)


def test_the_ratio_is_the_mean_of_each_answers_image_attention_per_token_over_its_text_attention_per_token() -> None:
    # Keys: first, system, prompt, two of the image, answer. The queries are the last prompt position and the answer's.
    kinds = kinds_of([(FIRST, 1), (SYSTEM, 1), (IMAGE, 2), (PROMPT, 1), (ANSWER, 2)])
    weights = torch.full((7, 7), 1e-30)
    weights[4] = torch.tensor([0.4, 0.1, 0.1, 0.2, 0.2, 0, 0]) + 1e-30
    weights[5] = torch.tensor([0.2, 0.1, 0.2, 0.1, 0.2, 0.2, 0]) + 1e-30
    model = OneLayer(weights)
    (shares,) = measure_shares(model, model, kinds)  # type: ignore[arg-type]
    assert shares.queries == 2
    assert shares.counts == {FIRST: 1, SYSTEM: 1, PROMPT: 1, IMAGE: 2, ANSWER: 2}
    torch.testing.assert_close(shares.shares[0, 0], torch.tensor([0.3, 0.1, 0.2, 0.3, 0.1]).double())

    # (0.3 / 2) / ((0.3 + 0.1 + 0.2) / 3), and the like without the first token, without the system prompt, and both.
    expected = [0.15 / 0.2, 0.15 / 0.15, 0.15 / 0.25, 0.15 / 0.2]
    for text, value in zip(TEXTS.values(), expected, strict=True):
        assert shares.ratio(text).item() == pytest.approx(value)

    other = Shares(shares.counts, 1, torch.tensor([0.0, 0.0, 0.2, 0.8, 0.0]).double()[None, None])
    assert lmar([shares, other], {PROMPT}).item() == pytest.approx((0.75 + 0.4 / 0.2) / 2)


@pytest.mark.parametrize("mode", [None, MoReS(rank=2, tokens="all"), MixLoRA(factors=4, rank=2, alpha=1.0)], ids=str)
@pytest.mark.parametrize("computed", ["sdpa", "eager"])
def test_shares_are_those_of_the_whole_attention_matrices(
    tiny: TinyLlava, patched_llava: Any, mode: Mode | None, computed: str
) -> None:
    model = load_llava(tiny.llava, attn_implementation=computed)
    kinds = kinds_of(LEFT, RIGHT)
    attended = kinds != PADDING
    embeds = torch.randn(*kinds.shape, model.config.hidden_size)
    if mode is not None:
        strengthen(attach(model, mode))

    def forward(**options: Any) -> Any:
        with torch.inference_mode(), token_map(kinds == IMAGE, attended, attended & (kinds != ANSWER)):
            return model(inputs_embeds=embeds, attention_mask=attended.long(), use_cache=False, **options)

    measured = measure_shares(model, forward, kinds)
    whole = forward(output_attentions=True).attentions  # a tensor [rows, heads, queries, keys] for each layer
    if mode is not None:
        remove(model)
    for row, shares in enumerate(measured):
        queries = [at - 1 for at in range(kinds.shape[1]) if kinds[row, at] == ANSWER]
        assert shares.queries == len(queries)
        for layer, weights in enumerate(whole):
            mean = weights[row][:, queries].double().mean(1)
            expected = torch.stack([mean[:, kinds[row] == kind].sum(-1) for kind in Kind], -1)
            torch.testing.assert_close(shares.shares[layer], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shares.shares.sum(-1), torch.ones(len(whole), 4).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [None, MoReS(rank=2, tokens="all"), MixLoRA(factors=4, rank=2, alpha=1.0)], ids=str)
@pytest.mark.parametrize("computed", ["sdpa", "eager"])
def test_what_is_measured_during_a_generation_is_what_a_pass_over_the_answers_gives(
    tiny: TinyLlava, patched_llava: Any, mode: Mode | None, computed: str
) -> None:
    model = load_llava(tiny.llava, attn_implementation=computed)
    if mode is None:
        AdapterPool(model)
    else:
        strengthen(attach(model, mode))
    prompts = [[1, *words(3), IMAGE_MARK, *words(2, seed=1)], [1, IMAGE_MARK, *words(4, seed=2), IMAGE_MARK, *words(9)]]
    images = [pictures(3)[:1], pictures(3)[1:]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    present = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])

    def kinds_of_prompts() -> Tensor:
        tokens = current().tokens  # type: ignore[union-attr]
        kinds = torch.full(tokens.visual.shape, PADDING)  # type: ignore[union-attr]
        kinds[tokens.attention] = int(PROMPT)  # type: ignore[union-attr]
        return kinds.masked_fill(tokens.visual, int(IMAGE))  # type: ignore[union-attr]

    measure = GenerationShares(model, kinds_of_prompts)
    with measure.watching():
        answers = [row[-NEW:] for row in generate(model, ids, pictures(3), attention_mask=present)]
    assert measure.whole
    assert [int((row == IMAGE).sum()) for row in measure.prompts] == [VISUAL_TOKENS, 2 * VISUAL_TOKENS]

    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        given = {"input_ids": torch.tensor([[*prompt, *answer]]), "images": images[row]}
        labels = torch.tensor([[-100] * len(prompt) + answer])
        kinds = torch.cat([measure.prompts[row][measure.prompts[row] != PADDING], torch.full((NEW,), int(ANSWER))])

        def forward(given: Any = given, labels: Tensor = labels) -> Any:
            with torch.inference_mode():
                return model(**given, labels=labels, use_cache=False)

        (expected,) = measure_shares(model, forward, kinds[None])
        for tokens in (NEW, 2):
            found = measure.of(row, tokens)
            assert (found.queries, found.counts[ANSWER]) == (tokens, tokens)
            if tokens == NEW:
                assert found.counts == expected.counts
                torch.testing.assert_close(found.shares, expected.shares, rtol=1e-5, atol=1e-6)
            else:
                assert not torch.allclose(found.shares, expected.shares, atol=1e-4)


def test_a_cache_that_forgets_keys_is_noticed() -> None:
    model = OneLayer(torch.ones(4, 4))
    weights: Callable[[Tensor], Tensor] = lambda hidden: functional.softmax(torch.ones(1, 2, hidden.shape[1], 4), -1)  # noqa: E731
    model.layers[0].forward = weights  # type: ignore[assignment]
    measure = GenerationShares(model, lambda: kinds_of([(FIRST, 1), (IMAGE, 2), (PROMPT, 1)]))  # type: ignore[arg-type]
    with measure.watching():
        model.layers[0](torch.ones(1, 4, 8))
        assert measure.whole
        model.layers[0](torch.ones(1, 1, 8))  # the fifth position sees four
    assert not measure.whole


def test_the_adapter_changes_the_shares(tiny: TinyLlava, patched_llava: Any) -> None:
    model = load_llava(tiny.llava)
    kinds = kinds_of(RIGHT)
    embeds = torch.randn(*kinds.shape, model.config.hidden_size)

    def forward() -> Any:
        with torch.inference_mode(), token_map(kinds == IMAGE):
            return model(inputs_embeds=embeds, use_cache=False)

    (base,) = measure_shares(model, forward, kinds)
    strengthen(attach(model, MoReS(rank=2, tokens="all")))
    (steered,) = measure_shares(model, forward, kinds)
    assert torch.equal(base.shares[0], steered.shares[0])  # the first layer's attention sees nothing steered yet
    assert not torch.allclose(base.shares[1], steered.shares[1], atol=1e-3)
    remove(model)
    (again,) = measure_shares(model, forward, kinds)
    assert torch.equal(base.shares, again.shares)


def test_rows_padded_on_either_side_are_measured_in_one_pass_as_they_are_alone(
    tiny: TinyLlava, patched_llava: Any
) -> None:
    model = load_llava(tiny.llava)
    kinds = kinds_of(LEFT, RIGHT)
    embeds = torch.randn(*kinds.shape, model.config.hidden_size)

    def measured(kinds: Tensor, embeds: Tensor) -> list[Shares]:
        attention = (kinds != PADDING).long()
        with torch.inference_mode():
            return measure_shares(model, lambda: model(inputs_embeds=embeds, attention_mask=attention), kinds)

    for row, together in enumerate(measured(kinds, embeds)):
        present = kinds[row] != PADDING
        (alone,) = measured(kinds[row, present][None], embeds[row, present][None])
        assert together.counts == alone.counts
        torch.testing.assert_close(together.shares, alone.shares, rtol=0, atol=1e-5)


def test_the_queries_are_the_positions_that_predict_the_answer() -> None:
    queries = answer_queries(kinds_of(LEFT, RIGHT))
    assert queries.nonzero().tolist() == [[0, n] for n in (18, 19, 20, 21)] + [[1, n] for n in (16, 17)]


def test_in_training_the_kinds_end_with_the_first_answer() -> None:
    # Left and right padding; a second turn; a row without a beginning-of-sequence token; one without labels.
    visual = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0]]).bool()
    present = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    labels = torch.full((3, 8), -100)
    labels[0, 6:], labels[1, 4], labels[1, 6], labels[2, 4] = 7, 7, 7, 7
    kinds = kinds_in_training(TokenMap(visual, present, present), labels, torch.tensor([True, True, False]))
    assert kinds.tolist() == [
        [PADDING, PADDING, FIRST, IMAGE, IMAGE, PROMPT, ANSWER, ANSWER],
        [FIRST, IMAGE, IMAGE, PROMPT, ANSWER, PADDING, PADDING, PADDING],
        [PROMPT, PROMPT, IMAGE, PROMPT, ANSWER, PADDING, PADDING, PADDING],
    ]
    nothing = kinds_in_training(TokenMap(visual, present, present), torch.full((3, 8), -100), torch.ones(3).bool())
    assert (
        not (nothing == ANSWER).any()
        and nothing[1].tolist() == kinds_of([(FIRST, 1), (IMAGE, 2), (PROMPT, 4), (PADDING, 1)])[0].tolist()
    )


def test_long_answers_come_in_chunks_and_grouped_queries_share_their_keys() -> None:
    torch.manual_seed(0)
    length = CHUNK + 10
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    model = OneLayer(torch.ones(1, 1))
    kinds = torch.full((1, length), int(ANSWER))
    kinds[0, 0] = int(FIRST)

    def attend(_: Any) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, key.repeat_interleave(2, 1), key.repeat_interleave(2, 1), is_causal=True
        )

    model.layers[0].forward = attend  # type: ignore[method-assign]
    sizes: list[int] = []
    with attention_taken(model, answer_queries(kinds), lambda layer, row, weights: sizes.append(weights.shape[1])):  # type: ignore[arg-type]
        model()
    assert sizes == [CHUNK, length - 1 - CHUNK]

    (shares,) = measure_shares(model, model, kinds)  # type: ignore[arg-type]
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5)[0]
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    expected = weights[:, :-1, 0].mean(1).double()
    torch.testing.assert_close(shares.shares[0, :, FIRST], expected, rtol=1e-5, atol=1e-7)


def test_attention_that_cannot_be_seen_is_an_error() -> None:
    model = OneLayer(torch.ones(3, 3))
    model.layers[0].forward = lambda logits: logits  # type: ignore[method-assign]
    with pytest.raises(SteeringError, match=r"layers 0 passes through none .* attn_implementation='sdpa'"):
        measure_shares(model, model, kinds_of([(FIRST, 1), (IMAGE, 1), (ANSWER, 1)]))  # type: ignore[arg-type]


def test_an_error_in_the_pass_leaves_no_hooks(tiny: TinyLlava, patched_llava: Any) -> None:
    model = load_llava(tiny.llava)

    def fail() -> None:
        raise RuntimeError("in the pass")

    hooks: Callable[[], int] = lambda: sum(  # noqa: E731
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    before = hooks()
    with pytest.raises(RuntimeError, match="in the pass"):
        measure_shares(model, fail, kinds_of(RIGHT))
    assert hooks() == before
