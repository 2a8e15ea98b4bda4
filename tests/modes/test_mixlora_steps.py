"""Decode steps of MixLoRA: rows of several adapters of a pool are computed at once, and answer as each does alone.

Covers `modes/mixlora_steps.py`, and `at_once` of `hooks/row_groups.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from routed import LONG, SHORT, adapted, batch, small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_steering_plugin import AdapterPool, save_adapter, token_map
from llava_steering_plugin.modes.mixlora import RoutedLinear

NEW = 6
PROMPTS = [SHORT, LONG, [3, 14, 15, 9, 26], [2, 7, 18, 28]]
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {},
    "three": {},
    "wider": {"rank": 3},
    "scaled": {"alpha": 3.0},
    "two linears": {"targets": "q_proj,v_proj"},
    "two others": {"targets": "q_proj,k_proj"},
}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def pool(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterPool]:
    folder: Path = tmp_path_factory.mktemp("adapters")
    for number, (name, settings) in enumerate(SETTINGS.items()):
        with adapted(base, **settings) as attachment:
            with torch.no_grad():
                for parameter in attachment.parameters().values():
                    parameter.mul_(1 - 0.4 * number)
            save_adapter(base, folder / name)
    pool = AdapterPool(base)
    for name in SETTINGS:
        pool.load(name, folder / name)
    yield pool
    pool.remove()


def scores(model: Any, rows: list[list[int]], names: list[str]) -> Tensor:
    """The scores of all steps, float32 [steps, rows, vocabulary]."""
    ids, attention = batch(*rows)
    with token_map(torch.zeros_like(attention, dtype=torch.bool), attention):
        found = model.generate(
            ids,
            attention_mask=attention,
            adapter_names=names,
            max_new_tokens=NEW,
            pad_token_id=0,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    return torch.stack(found.scores)


def check(base: LlamaForCausalLM, names: list[str]) -> None:
    rows = PROMPTS[: len(names)]
    alone = [scores(base, [row], [name]) for row, name in zip(rows, names, strict=True)]
    torch.testing.assert_close(scores(base, rows, names), torch.cat(alone, 1), atol=2e-5, rtol=1e-4)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every host with several adapters, in every decode step, whether their rows were computed at once."""
    found: list[bool] = []
    plain = RoutedLinear.at_once

    def noted(*args: Any) -> Any:
        update = plain(*args)
        found.append(update is not None)
        return update

    monkeypatch.setattr(RoutedLinear, "at_once", staticmethod(noted))
    return found


@pytest.mark.parametrize(
    "names",
    [
        ["one", "two"],
        ["two", AdapterPool.BASE, "one"],
        ["one", "two", "one", "two"],
        ["one", "one", "three", "two"],
    ],
)
def test_rows_of_adapters_that_are_alike_are_computed_at_once(
    base: LlamaForCausalLM, pool: AdapterPool, made: list[bool], names: list[str]
) -> None:
    check(base, names)
    linears = len(pool._adapters["one"].modules)
    # In the first step each adapter takes its factors. The first token is the prefill's.
    assert not made[0] and made[linears:] == [True] * linears * (NEW - 2)


@pytest.mark.parametrize(
    "names", [["one", "wider", "two"], ["one", "scaled"], ["one", "two linears"], ["one", "two linears", "two"]]
)
def test_rows_of_adapters_that_differ_are_computed_apart(
    base: LlamaForCausalLM, pool: AdapterPool, made: list[bool], names: list[str]
) -> None:
    check(base, names)
    assert made and not any(made)


def test_at_hosts_that_only_some_adapters_have_each_computes_its_own_rows(
    base: LlamaForCausalLM, pool: AdapterPool, made: list[bool]
) -> None:
    check(base, ["two linears", "two others"])
    assert any(made)


def test_a_hook_on_a_module_sees_every_call(base: LlamaForCausalLM, pool: AdapterPool, made: list[bool]) -> None:
    module = next(iter(pool._adapters["one"].modules.values()))
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda *args: seen.append(args[2].shape))
    try:
        check(base, ["one", "two"])
    finally:
        handle.remove()
    assert len(seen) == 2 * NEW  # alone, and beside the other


def test_more_rows_than_the_prefill_had_take_the_factors_anew(base: LlamaForCausalLM, pool: AdapterPool) -> None:
    """Beams repeat rows."""
    ids, attention = batch(*PROMPTS[:2])
    how = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False, "num_beams": 3}

    def answers(rows: slice, names: list[str]) -> Tensor:
        mask = attention[rows]
        with token_map(torch.zeros_like(mask, dtype=torch.bool), mask):
            found: Tensor = base.generate(ids[rows], attention_mask=mask, adapter_names=names, **how)
        return found[:, ids.shape[1] :]

    both = answers(slice(0, 2), ["one", "two"])
    assert torch.equal(both, torch.cat([answers(slice(0, 1), ["one"]), answers(slice(1, 2), ["two"])]))
