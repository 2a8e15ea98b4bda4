"""One engine of vLLM's for all tests: it takes seconds to start. `scripts/setup.sh --vllm` installs vLLM.

Tests that need it begin with `pytest.importorskip("vllm")`.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from vllm_bases import export_tiny, llavas_python
from vllm_fixtures import ADAPTERS, Engine, Reference, Shared, prompts_of
from vllm_projectors import save_with_projector

# Read when vLLM is imported. The engine runs in this process: it starts sooner, and one can look into it.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """The exported base, adapters for it, and transformers' answers."""
    if not llavas_python().is_file():
        pytest.skip(f"needs LLaVA to export a model, and there is no {llavas_python()}: scripts/setup.sh makes it")
    folder = tmp_path_factory.mktemp("vllm")
    base, llava, images = export_tiny(folder)
    reference = Reference(base)
    adapters = {
        name: reference.save(mode, size, number, folder / name)
        for number, (name, (mode, size)) in enumerate(ADAPTERS.items())
    }
    prompts = prompts_of(images)
    expected = {name: reference.answers(prompts, adapters.get(name or "")) for name in (None, *adapters)}
    return Shared(base, llava, reference, prompts, adapters, expected)


@pytest.fixture(scope="session")
def engine(shared: Shared) -> Engine:
    """An engine whose linears take PEFT's LoRAs too, and whose slots hold projectors."""
    return Engine(shared.base, enable_tower_connector_lora=True, disable_log_stats=False)


@pytest.fixture(scope="session")
def own(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Adapters that steer alike and project in other ways, one that has half of a projector, and one that has none."""
    folder, reference = tmp_path_factory.mktemp("own"), shared.reference
    adapters = {
        "one": save_with_projector(reference, 1, folder / "one"),
        "other": save_with_projector(reference, 2, folder / "other"),
        "half": save_with_projector(reference, 3, folder / "half", ["linear_1"]),
        "none": save_with_projector(reference, 0, folder / "none", []),
    }
    expected = {name: reference.answers(shared.prompts, path) for name, path in adapters.items()}
    assert reference.answers(shared.prompts[:1]) == shared.expected[None][:1]  # the base is as it was
    return replace(shared, adapters=adapters, expected={None: shared.expected[None], **expected}, first_number=20)
