"""A base whose projector is one linear, which is exported as two without an activation between them.

Covers `vllm/model.py`.
"""

from __future__ import annotations

import pytest
from vllm_bases import export_tiny, llavas_python
from vllm_fixtures import ADAPTERS, Engine, Reference, Shared, differing, prompts_of
from vllm_projectors import save_with_projector

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


@pytest.fixture(scope="module")
def one_linear(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """The base, an adapter that steers, and one that brings the linear, too."""
    if not llavas_python().is_file():
        pytest.skip(f"needs LLaVA to export a model, and there is no {llavas_python()}: scripts/setup.sh makes it")
    folder = tmp_path_factory.mktemp("one-linear")
    base, llava, images = export_tiny(folder, one_linear=True)
    reference, prompts = Reference(base), prompts_of(images)
    adapters = {
        "steers": reference.save(*ADAPTERS["all-1"], 1, folder / "steers"),
        "projects": save_with_projector(reference, 1, folder / "projects", ["linear_1"]),
    }
    expected = {name: reference.answers(prompts, adapters.get(name or "")) for name in (None, *adapters)}
    return Shared(base, llava, reference, prompts, adapters, expected)


def test_its_base_and_adapters_answer_as_in_transformers(one_linear: Shared) -> None:
    for name in one_linear.adapters:
        assert 2 * differing(one_linear.expected[name], one_linear.expected[None]) >= len(one_linear.prompts), name
    engine = Engine(one_linear.base, enable_tower_connector_lora=True)
    pairs = [(name, number) for number in range(len(one_linear.prompts)) for name in one_linear.expected]
    found = engine.answers(
        [one_linear.prompts[number] for _, number in pairs], [one_linear.request(name) for name, _ in pairs]
    )
    assert found == [one_linear.expected[name][number] for name, number in pairs]
