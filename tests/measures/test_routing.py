"""Choices of factors are seen, counted, compared with tasks, and replaced by others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from routed import LONG, SETTINGS, SHORT, adapted, batch, small_llama

from llava_steering_plugin import token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.measures import routing
from llava_steering_plugin.measures.routing import Choices

FACTORS, RANK = SETTINGS["factors"], SETTINGS["rank"]
PLACE = ("layers.0.self_attn.q_proj", "A")


@pytest.fixture(scope="module")
def base() -> Any:
    return small_llama()


@pytest.fixture
def attachment(base: Any) -> Iterator[Attachment]:
    with adapted(base) as attachment:
        yield attachment


def logits(model: Any, *rows: list[int]) -> torch.Tensor:
    ids, attention = batch(*rows)
    with torch.inference_mode(), token_map(torch.zeros_like(attention).bool(), attention):
        return model(input_ids=ids, attention_mask=attention).logits


def row_of(*chosen: list[int]) -> Choices:
    return {PLACE: torch.tensor(chosen[0])} if len(chosen) == 1 else {}


def test_the_choices_of_every_row_are_those_that_the_linears_made(base: Any, attachment: Attachment) -> None:
    linears = routing.routed_linears(attachment.modules)
    with routing.watched_choices(linears) as rows:
        logits(base, SHORT, LONG)
        logits(base, LONG)
    assert len(rows) == 3
    assert all(len(row) == 2 * len(linears) == 2 * 14 for row in rows)
    assert all(len(set(chosen.tolist())) == RANK for row in rows for chosen in row.values())
    assert {key: value.tolist() for key, value in rows[1].items()} == {k: v.tolist() for k, v in rows[2].items()}
    assert any(not torch.equal(rows[0][place], rows[1][place]) for place in rows[0])


def test_a_generation_is_one_row_because_decode_steps_choose_nothing(base: Any, attachment: Attachment) -> None:
    ids, attention = batch(SHORT)
    linears = routing.routed_linears(attachment.modules)
    with routing.watched_choices(linears) as rows, token_map(torch.zeros_like(attention).bool(), attention):
        base.generate(ids, attention_mask=attention, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(rows) == 1


def test_forced_choices_replace_the_routers_until_the_block_ends(base: Any, attachment: Attachment) -> None:
    linears = routing.routed_linears(attachment.modules)
    with routing.watched_choices(linears) as rows:
        own = logits(base, LONG)
        logits(base, SHORT)
    with routing.forced_choices(linears, rows[0]):
        assert torch.equal(logits(base, LONG), own)
    with routing.forced_choices(linears, rows[1]):
        assert not torch.allclose(logits(base, LONG), own)
    with pytest.raises(RuntimeError, match="inside"), routing.forced_choices(linears, rows[1]):
        raise RuntimeError("inside")
    assert torch.equal(logits(base, LONG), own)


def test_use_entropy_and_overlap_by_hand() -> None:
    rows = [row_of([0, 1]), row_of([0, 2]), row_of([1, 0]), row_of([3, 0])]
    shares = routing.use(rows, PLACE, 4)
    assert shares.tolist() == [1.0, 0.5, 0.25, 0.25]
    assert routing.entropy(shares) == pytest.approx((0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3) / math.log2(4))
    assert routing.entropy(torch.tensor([2.0, 0, 0])) == 0
    assert routing.entropy(torch.tensor([0.5, 0.5])) == pytest.approx(1)
    others = [row_of([0, 1]), row_of([2, 3])]  # half of the rows each
    assert routing.overlap(rows, others, PLACE, 4) == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 2)
    assert routing.overlap(rows, rows, PLACE, 4) == 1
    chosen = routing.most_frequent(rows, 4)[PLACE].tolist()
    assert chosen == [0, 1]


def test_sets_of_factors_that_tell_the_task_have_all_information_and_random_ones_have_none() -> None:
    tasks = ["a", "b"] * 50
    telling = [row_of([0, 1] if task == "a" else [3, 2]) for task in tasks]
    assert routing.mutual_information(telling, tasks, PLACE) == pytest.approx(1)
    swapped = [row_of([0, 1] if number % 4 < 2 else [1, 0]) for number in range(100)]  # one set, in two orders
    assert routing.mutual_information(swapped, tasks, PLACE) == pytest.approx(0, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    drawn = [routing.at_random(telling[0], 8, generator) for _ in tasks]
    assert abs(routing.mutual_information(drawn, tasks, PLACE)) < 0.05
    assert all(len(set(row[PLACE].tolist())) == 2 for row in drawn)


def test_choices_as_one_vector_for_each_row() -> None:
    other = ("layers.0.self_attn.q_proj", "B")
    rows: list[Choices] = [
        {PLACE: torch.tensor([2, 0]), other: torch.tensor([1])},
        {PLACE: torch.tensor([1, 3]), other: torch.tensor([0])},
    ]
    assert routing.multi_hot(rows, 4).int().tolist() == [[1, 0, 1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 0]]


def test_most_frequent_factors_keep_the_order_in_which_they_were_chosen() -> None:
    """The k-th A goes with the k-th B, so a router that is constant must not be reordered."""
    assert routing.most_frequent([row_of([3, 1]), row_of([3, 1])], 4)[PLACE].tolist() == [3, 1]
    rows = [row_of([1, 3]), row_of([2, 3]), row_of([1, 3]), row_of([3, 1])]  # 3: all rows, mostly second
    assert routing.most_frequent(rows, 4)[PLACE].tolist() == [1, 3]


def test_a_cycle_leaves_no_number_at_its_place() -> None:
    for seed in range(20):
        order = routing.cycled(5, torch.Generator().manual_seed(seed))
        assert sorted(order) == list(range(5))
        assert all(place != number for place, number in enumerate(order))
    assert routing.cycled(1, torch.Generator()) == [0]


@pytest.mark.parametrize("conditional", [True, False])
def test_scores_are_seen_in_eval_mode_and_lead_to_the_choices(base: Any, conditional: bool) -> None:
    with adapted(base, conditional=conditional) as attachment:
        linears = routing.routed_linears(attachment.modules)
        scores: list[routing.Scores] = []
        with routing.watched_choices(linears, scores) as rows:
            logits(base, SHORT, LONG)
        assert len(scores) == len(rows) == 2
        for row, scored in zip(rows, scores, strict=True):
            for place, chosen in row.items():
                assert float(scored[place].sum()) == pytest.approx(1, abs=1e-5)
                assert scored[place].topk(RANK).indices.tolist() == chosen.tolist()
        with routing.watched_choices(linears):
            logits(base, SHORT)
        assert not any(module.shows_probabilities for module in linears.values())
