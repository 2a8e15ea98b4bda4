"""Adapters come and go while others generate (`pool/residency.py`), and a pool gives its model back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled import BASE, MODES, Batch, answer, hooks_of
from steered import PROMPT, generate, ids_of, pictures
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llava_steering_plugin import AdapterPool, load_adapter, remove, save_adapter
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.hooks.owner import owner_of
from llava_steering_plugin.modes.mixlora import RoutedLinear

pytest_plugins = ["steered_fixtures", "pooled_fixtures"]

Folders = dict[str, Path]
THREADS, TURNS = 8, 4


class InTheMiddle(LogitsProcessor):
    """Calls something once, after the second token of a generation."""

    def __init__(self, call: Callable[[], Any]):
        self.call, self.tokens = call, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.tokens += 1
        if self.tokens == 2:
            self.call()
        return scores


def during(model: Any, name: str, call: Callable[[], Any]) -> list[list[int]]:
    """What `name` answers while `call` happens."""
    processors = LogitsProcessorList([InTheMiddle(call)])
    return generate(
        model, ids_of(PROMPT), pictures(1), do_sample=False, adapter_names=name, logits_processor=processors
    )


# Loading and unloading


def test_names_and_details_follow_what_is_loaded(pool: AdapterPool, shared: Any, folders: Folders) -> None:
    assert pool.names() == [BASE, *MODES] and pool.BASE == BASE
    details = pool.details("cats")
    assert (details.name, details.mode, details.path) == ("cats", "mores", folders["cats"])
    assert details.settings == MODES["cats"].settings()
    assert details.parameters == 4 * (2 * 64 * 2 + 2) and details.bytes == 4 * details.parameters
    projector = sum(value.numel() for value in shared.get_model().mm_projector.parameters())
    assert pool.details("birds").parameters == details.parameters + projector
    assert pool.details(BASE).mode == "none" and pool.details(BASE).parameters == 0

    pool.unload("cats")
    assert pool.names() == [BASE, *(name for name in MODES if name != "cats")]
    with pytest.raises(ArgumentsError, match="unknown adapter 'cats': did you mean 'bats'"):
        answer(shared, "cats")
    with pytest.raises(ArgumentsError, match="unknown adapter 'cats'"):
        pool.unload("cats")
    with pytest.raises(ArgumentsError, match="cannot be unloaded"):
        pool.unload(BASE)


@pytest.mark.parametrize("name", ["pets", "birds", "cats"])
@pytest.mark.parametrize("change", ["unload", "replace"])
def test_a_generation_keeps_the_adapter_it_started_with(
    pool: AdapterPool, shared: Any, folders: Folders, name: str, change: str
) -> None:
    expected, of_dogs = answer(shared, name), answer(shared, "dogs")
    if change == "unload":
        assert during(shared, name, lambda: pool.unload(name)) == expected
        assert name not in pool.names()
    else:
        assert during(shared, name, lambda: pool.load(name, folders["dogs"])) == expected
        assert answer(shared, name) == of_dogs


def test_the_last_adapter_to_go_takes_the_hooks_with_it(shared: Any, folders: Folders) -> None:
    pool, before = AdapterPool(shared), hooks_of(shared)
    pool.load("pets", folders["pets"])
    with_mixlora = hooks_of(shared)
    pool.load("cats", folders["cats"])
    pool.load("birds", folders["birds"])
    assert with_mixlora == before + 4 * 7 and hooks_of(shared) == with_mixlora + 4 + 1
    held: list[int] = []
    during(shared, "pets", lambda: (pool.unload("pets"), held.append(hooks_of(shared))))
    assert held == [with_mixlora + 4 + 1], "a generation in flight still needs them"
    assert hooks_of(shared) == before + 4 + 1
    pool.unload("birds")
    pool.unload("cats")
    assert hooks_of(shared) == before


def test_threads_get_their_own_adapters_while_one_is_replaced_all_the_time(
    pool: AdapterPool, shared: Any, folders: Folders
) -> None:
    names = [BASE, *MODES, "swapped"]
    pool.load("swapped", folders["cats"])
    expected = {name: [answer(shared, name)] for name in names}
    expected["swapped"].append(answer(shared, "dogs"))
    assert len({str(text) for texts in expected.values() for text in texts}) > 5
    stop = threading.Event()

    def replace_it() -> int:
        times = 0
        while not stop.is_set():
            times += 1
            pool.load("swapped", folders["dogs" if times % 2 else "cats"])
            pool.load("passing by", folders["pets"])
            pool.unload("passing by")
        return times

    def ask(thread: int) -> list[tuple[str, list[list[int]]]]:
        order = [names[(thread + turn) % len(names)] for turn in range(TURNS)]
        return [(name, answer(shared, name)) for name in order]

    with ThreadPoolExecutor(THREADS + 1) as threads:
        replacing = threads.submit(replace_it)
        try:
            answers = [found for each in threads.map(ask, range(THREADS)) for found in each]
        finally:
            stop.set()
        assert replacing.result() > 1
    assert len(answers) == THREADS * TURNS
    for name, text in answers:
        assert text in expected[name], name


# On the device and off it


def test_the_least_recently_used_adapters_wait_in_memory_and_those_in_use_never_do(
    shared: Any, folders: Folders
) -> None:
    pool = AdapterPool(shared, max_resident=2)
    for name in ("cats", "pets", "birds", "dogs"):
        pool.load(name, folders[name])

    def resident() -> set[str]:
        return {name for name in pool.names() if name != BASE and pool.details(name).resident}

    assert resident() == {"cats", "pets"}
    texts = {name: answer(shared, name) for name in ("birds", "cats", "dogs", "pets")}
    assert resident() == {"dogs", "pets"}
    answer(shared, "dogs")
    answer(shared, "cats")
    assert resident() == {"dogs", "cats"}, "pets was used less recently than dogs"
    held: list[set[str]] = []
    during(shared, "dogs", lambda: [answer(shared, name) for name in ("birds", "pets")] + [held.append(resident())])
    assert held == [{"dogs", "pets"}]
    batch = Batch(["cats", "pets", "birds", "dogs"])
    mixed = batch.generated(shared, adapter_names=batch.names)
    assert len(resident()) == 2
    roomy = [batch.generated(shared, adapter_names=name)[row] for row, name in enumerate(batch.names)]
    assert mixed == roomy
    assert {name: answer(shared, name) for name in texts} == texts
    pool.unload("cats")
    pool.unload("pets")
    assert resident() <= {"birds", "dogs"}


def test_an_adapter_that_does_not_fit_on_the_device_fails_its_own_call_only(
    shared: Any, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = AdapterPool(shared, max_resident=1)
    for name in ("cats", "pets"):
        pool.load(name, folders[name])
    expected = answer(shared, "cats")
    with monkeypatch.context() as patched:

        def full(module: Any, device: Any) -> Any:
            raise torch.OutOfMemoryError("no memory left")

        patched.setattr(RoutedLinear, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            answer(shared, "pets")
        assert answer(shared, "cats") == expected
    assert answer(shared, "pets") != expected and answer(shared, "cats") == expected
    pool.remove()


@pytest.mark.parametrize("name", ["cats", "new"])
def test_an_adapter_that_does_not_fit_on_the_device_when_it_is_loaded_changes_nothing(
    shared: Any, folders: Folders, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pool = AdapterPool(shared)
    pool.load("cats", folders["cats"])
    hooks, expected = hooks_of(shared), answer(shared, "cats")
    with monkeypatch.context() as patched:

        def full(module: Any, device: Any) -> Any:
            raise torch.OutOfMemoryError("no memory left")

        patched.setattr(RoutedLinear, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            pool.load(name, folders["pets"])
    assert pool.names() == [BASE, "cats"]
    assert hooks_of(shared) == hooks and answer(shared, "cats") == expected
    pool.load(name, folders["pets"])
    assert answer(shared, name) != expected
    pool.remove()


def test_a_device_must_have_room_for_one_adapter(shared: Any) -> None:
    with pytest.raises(ArgumentsError, match="max_resident is 0"):
        AdapterPool(shared, max_resident=0)
    assert owner_of(shared) is None


# The model afterwards


def test_remove_gives_the_model_back_to_the_bit(shared: Any, folders: Folders) -> None:
    batch = Batch(["cats", "pets", "birds"])
    state = {name: value.clone() for name, value in shared.state_dict().items()}
    attributes, hooks, plain = set(shared.__dict__), hooks_of(shared), batch.logits(shared)
    pool = AdapterPool(shared)
    for name in batch.names:
        pool.load(name, folders[name])
    assert shared.state_dict().keys() == state.keys(), "adapters must be no part of the model"
    batch.logits(shared, adapter_names=batch.names)
    remove(shared)
    assert set(shared.__dict__) == attributes and hooks_of(shared) == hooks
    assert all(torch.equal(value, state[name]) for name, value in shared.state_dict().items())
    assert torch.equal(batch.logits(shared), plain)
    with pytest.raises(SteeringError, match="given its model back"):
        pool.load("cats", folders["cats"])
    assert hooks_of(shared) == hooks
    load_adapter(shared, folders["pets"])
    remove(shared)


def test_a_pool_in_use_is_not_removed_and_a_model_has_one_owner(
    pool: AdapterPool, shared: Any, folders: Folders
) -> None:
    refused: list[str] = []

    def try_to_remove() -> None:
        with pytest.raises(SteeringError, match="in use") as raised:
            pool.remove()
        refused.append(str(raised.value))

    during(shared, "cats", try_to_remove)
    assert len(refused) == 1
    with pytest.raises(SteeringError, match="carries an adapter already"):
        AdapterPool(shared)
    with pytest.raises(SteeringError, match="carries an adapter already"):
        load_adapter(shared, folders["cats"])
    with pytest.raises(SteeringError, match="pool"):
        save_adapter(shared, folders["cats"])
