"""LoRAs of PEFT's answer beside our adapters, and the base beside both, whichever slots they have.

Covers `vllm/rows_without_lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_fixtures import Engine, Shared, differing

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


@pytest.fixture(scope="module")
def lora(engine: Engine, shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A request for a LoRA of PEFT's, and its answers to `shared.prompts`."""
    from vllm.lora.request import LoRARequest

    folder: Path = tmp_path_factory.mktemp("peft")
    expected = shared.reference.save_peft(shared.prompts, folder)
    assert 2 * differing(expected, shared.expected[None]) >= len(expected)
    request = LoRARequest("lora", 90, str(folder))
    yield request, expected
    engine.llm.llm_engine.remove_lora(request.lora_int_id)


@pytest.mark.parametrize("slot", range(Engine.SLOTS))
def test_base_and_adapters_answer_beside_a_lora_of_pefts_in_any_slot(
    slot: int, engine: Engine, shared: Shared, lora: tuple[Any, Any]
) -> None:
    request, expected = lora
    ours = [shared.request(name) for name in list(shared.adapters)[: engine.SLOTS - 1]]
    control = engine.llm.llm_engine
    engine.llm.reset_prefix_cache()
    for number in control.list_loras():
        control.remove_lora(number)
    for each in [*ours[:slot], request, *ours[slot:]]:  # free slots are filled in their order
        control.add_lora(each)
    # The LoRA first keeps its slot while nobody asks for it.
    for given in ([ours[0], None, ours[1]], [request, ours[0], None]):
        prompts = [prompt for prompt in shared.prompts for _ in given]
        found = engine.answers(prompts, given * len(shared.prompts))
        for number, each in enumerate(given):
            answers = expected if each is request else shared.expected[each.lora_name if each else None]
            assert found[number :: len(given)] == answers, (number, each)


@pytest.mark.parametrize("is_prefill", [True, False])
def test_rows_without_a_lora_are_left_alone_on_the_cpu(is_prefill: bool) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    import llava_steering_plugin.vllm.model  # noqa: F401

    slots, rank, width, scale = 3, 2, 8, 0.5
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(slots, 1, rank, width, generator=generator)
    b = torch.randn(slots, 1, width, rank, generator=generator)
    a[0] = torch.nan  # of a LoRA that is broken, which is nobody else's concern
    numbers = (0, 7, 8, 0, 8, 7)  # of the LoRAs, by row
    wrapper = PunicaWrapperCPU(len(numbers), len(numbers), "cpu")
    wrapper.update_metadata(LoRAMapping(numbers, numbers, is_prefill), [9, 7, 8], slots + 1, 100)
    states, output = (torch.randn(len(numbers), width, generator=generator) for _ in range(2))
    expected = output.clone()
    for row, number in enumerate(numbers):
        if number:
            slot = [9, 7, 8].index(number)
            expected[row] += b[slot, 0] @ (a[slot, 0] @ states[row]) * scale
    base = [row for row, number in enumerate(numbers) if not number]
    before = output[base].clone()
    wrapper.add_lora_linear(output, states, (a,), (b,), scale, (width,))
    torch.testing.assert_close(output, expected)
    assert torch.equal(output[base], before)
