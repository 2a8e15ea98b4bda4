"""Requests that lose their place to others, and begin again, are answered as transformers does.

vLLM preempts a request where its cache has no block left, and computes its prompt, with its images, once more.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm_fixtures import Engine, Shared

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def test_requests_that_were_preempted_are_answered_as_in_transformers(
    shared: Shared, own: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def counted(self: Scheduler, request: Any, *rest: Any, **named: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *rest, **named)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    length = 128
    # No more than one prompt of the largest length needs, and the block that vLLM keeps for itself.
    blocks = length // Engine.BLOCK + 1
    engine = Engine(
        shared.base,
        max_model_len=length,
        num_gpu_blocks_override=blocks,
        enable_tower_connector_lora=True,
        lora_target_modules=["steering", "steering_tokens"],
    )
    asked = [
        (given, name, number)
        for number in range(len(shared.prompts))
        for given in (shared, own)
        for name in given.expected
    ]
    prompts = [shared.prompts[number] for _, _, number in asked]
    found = engine.answers(prompts, [given.request(name) for given, name, _ in asked])
    assert found == [given.expected[name][number] for given, name, number in asked]
    assert len(preempted) >= len(shared.expected)
