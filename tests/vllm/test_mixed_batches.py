"""Batches of the base and many adapters in vLLM answer as transformers does.

Covers `vllm/model.py`, `vllm/layers.py`, `vllm/worker.py`, `vllm/plugin.py`.
"""

from __future__ import annotations

import pytest
from vllm_fixtures import Engine, Prompt, Shared, differing

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def mixed(shared: Shared) -> list[tuple[str | None, int]]:
    """Every prompt with the base and every adapter, so that neighbours in a batch have different ones."""
    return [(name, number) for number in range(len(shared.prompts)) for name in shared.expected]


def ask(engine: Engine, shared: Shared, pairs: list[tuple[str | None, int]]) -> list[list[int]]:
    prompts = [shared.prompts[number] for _, number in pairs]
    return engine.answers(prompts, [shared.request(name) for name, _ in pairs])


def is_image(shared: Shared, prompt: Prompt) -> list[bool]:
    """Which tokens of a prompt are an image's."""
    ids = shared.reference.inputs(prompt)["input_ids"][0]
    return (ids == shared.reference.model.config.image_token_index).tolist()


def test_every_adapter_changes_at_least_half_of_the_answers(shared: Shared) -> None:
    counts = {name: differing(found, shared.expected[None]) for name, found in shared.expected.items() if name}
    assert len(counts) == 8 and all(2 * count >= len(shared.prompts) for count in counts.values()), counts


def test_mixed_batches_answer_as_transformers_cold_and_from_the_cache(engine: Engine, shared: Shared) -> None:
    assert len(shared.adapters) > 2 * engine.SLOTS  # so that slots are given to others and back
    pairs = mixed(shared)
    expected = [shared.expected[name][number] for name, number in pairs]
    engine.llm.reset_prefix_cache()
    assert ask(engine, shared, pairs) == expected
    hits = engine.counted("vllm:prefix_cache_hits")
    assert ask(engine, shared, pairs) == expected
    assert engine.counted("vllm:prefix_cache_hits") >= hits + engine.BLOCK * len(pairs)


def test_what_the_cache_holds_may_end_inside_of_an_image(engine: Engine, shared: Shared) -> None:
    cut = [number for number, prompt in enumerate(shared.prompts) if is_image(shared, prompt)[engine.BLOCK]]
    assert cut and all(is_image(shared, shared.prompts[number])[engine.BLOCK - 1] for number in cut)
    pairs = [(name, number) for number in cut for name in shared.expected]
    ask(engine, shared, pairs)
    hits = engine.counted("vllm:prefix_cache_hits")
    assert ask(engine, shared, pairs) == [shared.expected[name][number] for name, number in pairs]
    assert engine.counted("vllm:prefix_cache_hits") == hits + engine.BLOCK * len(pairs)


def test_a_prompt_that_is_cut_inside_of_an_image_is_steered_as_a_whole_one(engine: Engine, shared: Shared) -> None:
    marks = [is_image(shared, prompt) for prompt in shared.prompts]
    number = next(number for number, mark in enumerate(marks) if mark[engine.CHUNK - 1] and mark[engine.CHUNK])
    for name, answers in shared.expected.items():
        engine.llm.reset_prefix_cache()
        assert ask(engine, shared, [(name, number)]) == [answers[number]], name


def test_text_alone_is_not_steered(engine: Engine, shared: Shared) -> None:
    prompt = Prompt("USER: What is red? ASSISTANT:", ())
    names = [None, *shared.adapters]
    found = engine.answers([prompt] * len(names), [shared.request(name) for name in names])
    assert found == shared.reference.answers([prompt]) * len(names)


def test_the_entry_point_may_be_called_again(engine: Engine, shared: Shared) -> None:
    from importlib.metadata import entry_points

    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
    from vllm.v1.engine.input_processor import InputProcessor

    (ours,) = entry_points(group="vllm.general_plugins", name="llava_steering")
    seams = (
        (WorkerLoRAManager, "_load_adapter"),
        (LRUCacheWorkerLoRAManager, "add_adapter"),
        (InputProcessor, "process_inputs"),
        (InputProcessor, "_get_mm_identifier"),
    )
    before = [owner.__dict__[name] for owner, name in seams]
    ours.load()()
    assert [owner.__dict__[name] for owner, name in seams] == before
    assert ask(engine, shared, [("all-1", 0)]) == [shared.expected["all-1"][0]]
