"""Many adapters on one model: every row of a batch gets what its adapter gives alone, however the batch is mixed.

Holds for `pool/adapter.py`, `pool/projectors.py` and `pool/choosing.py`, too.

How rows are named: `pool/row_names.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled import BASE, Batch, alone
from steered import IMAGE, NEW, PROMPT, TEXT, generate, ids_of, logits_of, mask_of, pictures
from tiny_llava import LAYERS
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from llava_steering_plugin import AdapterPool, disabled, token_map, using
from llava_steering_plugin.errors import ArgumentsError, SteeringError, TokenMapError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.mixlora import RoutedLinear
from llava_steering_plugin.modes.mores import SteeredLayer

pytest_plugins = ["steered_fixtures", "pooled_fixtures"]

# Every kind of adapter between rows of the base, on rows with one image, two, none, one, two, none, ... `fish` pools
# padding too, as its authors' code does, so it is on one of the longest rows.
NAMES = ["cats", BASE, "pets", "bats", "fish", "pets", "dogs", "birds", BASE, "newts", "moths"]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}
# What looks at padding too (contrastive search), or draws for all rows from one generator: alone, a row gets others.
OF_THE_BATCH: dict[str, dict[str, Any]] = {
    "samples": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
}
Folders = dict[str, Path]


@contextmanager
def padding_left(model: Any) -> Iterator[None]:
    model.config.tokenizer_padding_side = "left"
    try:
        yield
    finally:
        model.config.tokenizer_padding_side = "right"


def assert_close(here: Tensor, there: Tensor) -> None:
    """To 1e-5 of the largest logit."""
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5 * float(there.abs().max()))


# Equal to one by one


def test_a_forward_over_mixed_rows_gives_each_row_the_logits_of_its_adapter_alone(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders
) -> None:
    batch = Batch(NAMES)
    logits = batch.logits(shared, adapter_names=batch.names)
    for row, name in enumerate(batch.names):
        with alone(frozen, folders.get(name)):
            expected = batch.logits_alone(frozen, row)
        assert_close(logits[row, -len(expected) :], expected)
        plain = batch.logits_alone(frozen, row)
        assert name == BASE or not torch.allclose(plain, expected, atol=1e-2), f"{name} shows nothing in this row"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed_rows_generate_what_their_adapters_generate_alone(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders, strategy: str
) -> None:
    options = STRATEGIES[strategy]
    batch = Batch(NAMES)
    together = batch.generated(shared, adapter_names=batch.names, **options)
    returned = options.get("num_return_sequences", 1)
    for row, name in enumerate(batch.names):
        with alone(frozen, folders.get(name)):
            expected = batch.generated_alone(frozen, row, **options)
        assert together[row * returned : (row + 1) * returned] == expected, name


@pytest.mark.parametrize("strategy", OF_THE_BATCH)
def test_mixed_rows_generate_what_a_batch_of_one_adapter_generates_in_the_same_place(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders, strategy: str
) -> None:
    batch, options = Batch(NAMES), OF_THE_BATCH[strategy]
    returned = options.get("num_return_sequences", 1)
    together = batch.generated(shared, adapter_names=batch.names, **options)
    for name in dict.fromkeys(batch.names):
        with padding_left(frozen), alone(frozen, folders.get(name)):
            expected = batch.generated(frozen, **options)
        for row in (number for number, other in enumerate(batch.names) if other == name):
            mine = slice(row * returned, (row + 1) * returned)
            assert together[mine] == expected[mine], name


@pytest.mark.parametrize("name", ["cats", "dogs", "pets", "fish", "birds", "bats", "newts", "moths"])
def test_one_adapter_for_all_rows_is_bit_equal_to_the_same_adapter_attached(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders, name: str
) -> None:
    batch = Batch(NAMES)
    here, texts = batch.logits(shared, adapter_names=name), batch.generated(shared, adapter_names=name)
    with padding_left(frozen), alone(frozen, folders[name]):
        assert torch.equal(here, batch.logits(frozen))
        assert texts == batch.generated(frozen)


def test_rows_of_the_base_are_bit_equal_to_the_plain_model_whoever_is_beside_them(
    pool: AdapterPool, shared: Any, frozen: Any
) -> None:
    batch = Batch(NAMES)
    with padding_left(frozen):
        plain = batch.logits(frozen)
    mixed, unnamed = batch.logits(shared, adapter_names=batch.names), batch.logits(shared)
    of_base = [row for row, name in enumerate(batch.names) if name == BASE]
    assert torch.equal(mixed[of_base], plain[of_base])
    assert torch.equal(unnamed, plain), "a call that names nothing must be the plain model"


def test_tiles_of_several_images_go_through_the_projector_of_their_row(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders
) -> None:
    names, tiles = ["birds", "cats", BASE, "bats"], (2, 1, 3, 2)
    images = [pictures(count, seed) for seed, count in enumerate(tiles)]
    rows = [[1, 300 + row, IMAGE, 301, 302] for row in range(len(names))]
    present = torch.ones(len(rows), 5, dtype=torch.long)
    together = generate(shared, ids_of(*rows), images, attention_mask=present, adapter_names=names)
    for row, name in enumerate(names):
        with alone(frozen, folders.get(name)):
            assert together[row] == generate(frozen, ids_of(rows[row]), [images[row]])[0], name


def test_images_that_padding_hides_do_not_shift_the_projectors(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders
) -> None:
    ids = ids_of([1, IMAGE, 300, 301], [1, IMAGE, 302, 303])
    ids[0, 1] = IMAGE
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    images = pictures(2)
    together = logits_of(shared, ids, images, attention_mask=attention, adapter_names=["cats", "birds"])
    with padding_left(frozen), alone(frozen, folders["birds"]):
        assert_close(together[1], logits_of(frozen, ids, images, attention_mask=attention)[1])


# How a call names its adapters


def test_using_names_adapters_for_code_that_cannot_and_a_keyword_wins(pool: AdapterPool, shared: Any) -> None:
    ids, images = ids_of(PROMPT, PROMPT), pictures(2)
    named = {name: generate(shared, ids, images, adapter_names=name) for name in ("cats", "pets")}
    assert named["cats"] != named["pets"]
    with using(shared, "cats"):
        assert generate(shared, ids, images) == named["cats"]
        assert generate(shared, ids, images, adapter_names="pets") == named["pets"]
        with using(shared, ["cats", "pets"]):
            assert generate(shared, ids, images) == [named["cats"][0], named["pets"][1]]
        with disabled(shared):
            assert generate(shared, ids, images) == generate(shared, ids, images, adapter_names=BASE)
        assert generate(shared, ids, images) == named["cats"]


def test_embeddings_made_inside_using_are_those_of_the_named_adapters(
    pool: AdapterPool, shared: Any, frozen: Any, folders: dict[str, Path]
) -> None:
    def embeddings(model: Any, rows: int = 1) -> Tensor:
        ids, images = ids_of(*[PROMPT] * rows), pictures(1).repeat(rows, 1, 1, 1)
        with torch.inference_mode():
            return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]

    base = embeddings(frozen)
    with alone(frozen, folders["birds"]):
        own = embeddings(frozen)
    assert not torch.equal(own, base)
    with using(shared, "birds"):
        assert torch.equal(embeddings(shared), own)
        with disabled(shared):
            assert torch.equal(embeddings(shared), base)
    with using(shared, ["cats", "birds"]):
        torch.testing.assert_close(embeddings(shared, 2), torch.cat([base, own]))
        with pytest.raises(ArgumentsError, match="2 names and the batch 1 rows"):
            embeddings(shared)
    assert torch.equal(embeddings(shared), base)


def test_names_may_come_from_anything_that_yields_them(pool: AdapterPool, shared: Any) -> None:
    ids, images = ids_of(PROMPT, PROMPT), pictures(2)
    names = ["cats", "pets"]
    expected = generate(shared, ids, images, adapter_names=names)
    for given in (iter(names), tuple(names), dict.fromkeys(names).keys(), (name for name in names)):
        assert generate(shared, ids, images, adapter_names=given) == expected
    with using(shared, iter(names)):
        assert generate(shared, ids, images) == generate(shared, ids, images) == expected
    with pytest.raises(ArgumentsError, match="1048576 names and the batch 2 rows"):
        generate(shared, ids, images, adapter_names=repeat("cats"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (7, "adapter_names is 7. Give one name for each row"),
        ("cast", "unknown adapter 'cast': did you mean 'cats'\\? Known: __base__, cats, dogs"),
        (["cats", 3], "unknown adapter 3"),
        (["cats"], "1 names and the batch 2 rows"),
        (["cats", BASE, BASE, BASE], "4 names and the batch 2 rows"),
        ([], "0 names and the batch 2 rows"),
    ],
)
def test_names_that_fit_no_adapter_or_no_row_are_refused(
    pool: AdapterPool, shared: Any, names: Any, message: str
) -> None:
    with pytest.raises(ArgumentsError, match=message):
        generate(shared, ids_of(PROMPT, PROMPT), pictures(2), adapter_names=names)
    with pytest.raises(ArgumentsError, match=message):
        logits_of(shared, ids_of(TEXT, TEXT), None, adapter_names=names)
    assert not any(shared.llava_steering.details(name).resident is False for name in pool.names())


def test_using_refuses_unknown_names_and_models_without_a_pool(pool: AdapterPool, shared: Any, frozen: Any) -> None:
    with pytest.raises(ArgumentsError, match="unknown adapter 'owls'"), using(shared, "owls"):
        pass
    with pytest.raises(SteeringError, match="AdapterPool"), using(frozen, "cats"):
        pass


def test_a_stack_called_on_its_own_inside_using_is_an_error_and_not_the_plain_base(
    pool: AdapterPool, shared: Any
) -> None:
    embeds, mask = torch.randn(1, 4, 64), mask_of((1, 2, 1))
    with using(shared, "cats"), token_map(visual=mask), pytest.raises(TokenMapError, match="on its own"):
        shared.model(inputs_embeds=embeds)
    with token_map(visual=mask):
        named = shared(inputs_embeds=embeds, adapter_names="cats").logits
        assert not torch.equal(named, shared(inputs_embeds=embeds).logits)


# What it costs


class Watch(StoppingCriteria):
    """Notes after every pass but the last how many groups of rows had something to do in it."""

    def __init__(self) -> None:
        self.groups: list[int] = []

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: Any) -> bool:
        scope = current()
        assert scope is not None
        self.groups.append(len(scope.groups))
        return False


def test_decode_steps_have_nothing_to_do_for_mores_and_only_their_own_rows_for_mixlora(
    pool: AdapterPool, shared: Any
) -> None:
    ids, images, watch = ids_of(*[PROMPT] * 4), pictures(4), Watch()
    criteria = StoppingCriteriaList([watch])
    generate(shared, ids, images, adapter_names=["cats", "dogs", "birds", BASE], stopping_criteria=criteria)
    generate(shared, ids, images, adapter_names=["cats", "pets", BASE, "bats"], stopping_criteria=criteria)
    assert watch.groups == [3, 0, 0, 0, 0, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("names", ["newts", ["newts", BASE, "cats", "pets"]], ids=["alone", "mixed"])
def test_the_steering_of_a_joint_adapter_is_not_called_at_decode_steps(
    pool: AdapterPool, shared: Any, names: Any
) -> None:
    calls: Counter[type] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda module, args: calls.update([type(module)]))
        for module in pool.modules("newts").values()
    ]
    generate(shared, ids_of(*[PROMPT] * 4), pictures(4), adapter_names=names)
    for handle in handles:
        handle.remove()
    assert calls == {SteeredLayer: LAYERS, RoutedLinear: NEW * LAYERS * 2}
