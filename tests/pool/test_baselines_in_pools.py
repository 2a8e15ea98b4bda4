"""PEFT's methods in a pool beside MoReS, MixLoRA and the base: every row of a mixed batch is as its adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import baseline, moved
from pooled import BASE, Batch, alone
from steered import logits_of

from llava_steering_plugin import AdapterPool, attach, remove_adapter, save_adapter

pytest_plugins = ["steered_fixtures", "pooled_fixtures"]

KINDS = ("lora", "dora", "ia3", "oft", "loha", "lokr")
NAMES = ["cats", BASE, "lora", "dora", "pets", "ia3", "oft", "loha", "lokr", "lora"]


@pytest.fixture(scope="module")
def saved(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("baselines")
    for seed, name in enumerate(KINDS):
        moved(attach(frozen, baseline(name)).parameters().values(), seed)
        save_adapter(frozen, root / name)
        remove_adapter(frozen)
    return {name: root / name for name in KINDS}


@pytest.fixture
def mixed(shared: Any, folders: dict[str, Path], saved: dict[str, Path]) -> Iterator[AdapterPool]:
    pool = AdapterPool(shared)
    for name in dict.fromkeys(NAMES):
        if name != BASE:
            pool.load(name, {**folders, **saved}[name])
    yield pool


def test_mixed_rows_get_the_logits_and_answers_of_their_adapters_alone(
    mixed: AdapterPool, shared: Any, frozen: Any, folders: dict[str, Path], saved: dict[str, Path]
) -> None:
    batch = Batch(NAMES)
    logits = batch.logits(shared, adapter_names=batch.names)
    texts = batch.generated(shared, adapter_names=batch.names, do_sample=False)
    for row, name in enumerate(batch.names):
        with alone(frozen, {**folders, **saved}.get(name)):
            expected = batch.logits_alone(frozen, row)
            text = batch.generated_alone(frozen, row, do_sample=False)
        here = logits[row, -len(expected) :]
        torch.testing.assert_close(here, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert [texts[row]] == text, name
        assert name == BASE or not torch.allclose(batch.logits_alone(frozen, row), expected, atol=1e-3), name


def test_rows_of_the_base_and_the_model_after_the_pool_are_the_base_to_the_bit(
    mixed: AdapterPool, shared: Any, frozen: Any
) -> None:
    batch = Batch(NAMES)
    ids, attention, images = batch.together()
    mixed.remove()
    plain = logits_of(shared, ids, images, attention_mask=attention)
    shared_again = {name: value for name, value in shared.state_dict().items()}
    assert not [name for name, value in frozen.state_dict().items() if not torch.equal(value, shared_again[name])]
    pool = AdapterPool(shared)
    assert torch.equal(logits_of(shared, ids, images, attention_mask=attention), plain)
    assert pool.names() == [BASE]
