"""GET /metrics: what is counted of all answers, under vLLM's names and our own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import requests
from api_fixtures import LIMITS, asks
from ports import free_port
from serving_fixtures import BASE_NAME, NAMES, Client, Question, listening, wait_until

pytest_plugins = ["serving_fixtures", "api_fixtures"]
parser = pytest.importorskip(
    "prometheus_client.parser", reason="/metrics needs prometheus-client: run scripts/setup.sh"
)
pytest.importorskip("sse_starlette", reason="the API needs sse-starlette: run scripts/setup.sh")

Read = Callable[[], dict[str, float]]


@pytest.fixture
def fresh(worker: Any) -> Iterator[Client]:
    """A worker that has counted nothing yet."""
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.openai.api import ApiSettings

    with listening(build(worker, replace(LIMITS, batch=1), api=ApiSettings()), free_port()) as client:
        yield client


def samples(client: Client) -> list[Any]:
    response = requests.get(f"{client.address}/metrics", timeout=30)
    assert response.headers["content-type"].startswith("text/plain; version=")
    return [each for family in parser.text_string_to_metric_families(response.text) for each in family.samples]


def values(client: Client, **labels: str) -> dict[str, float]:
    return {each.name: each.value for each in samples(client) if labels.items() <= each.labels.items()}


def counted(client: Client) -> float:
    """How many requests run and wait."""
    now = values(client)
    return now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]


def test_answers_of_both_protocols_are_counted(fresh: Client, asked: list[Question]) -> None:
    model = {"model_name": BASE_NAME, "engine": "0"}
    before = values(fresh, **model)
    assert before["vllm:generation_tokens_total"] == before["vllm:prompt_tokens_total"] == 0
    used = requests.post(f"{fresh.address}/v1/chat/completions", json=asks(asked[0]), timeout=60).json()["usage"]
    # A batch is counted when all of it is generated; an answer may be read before.
    wait_until(lambda: values(fresh, **model)["llava_steering_steps_per_batch_count"] == 1)
    after = values(fresh, **model)
    assert after["vllm:prompt_tokens_total"] == used["prompt_tokens"]
    assert after["vllm:generation_tokens_total"] == used["completion_tokens"]
    assert after["vllm:time_to_first_token_seconds_count"] == after["vllm:e2e_request_latency_seconds_count"] == 1
    # The first text may stand for several tokens.
    assert 0 < after["vllm:inter_token_latency_seconds_count"] < used["completion_tokens"]
    whole = after["vllm:e2e_request_latency_seconds_sum"]
    parts = after["vllm:time_to_first_token_seconds_sum"] + after["vllm:inter_token_latency_seconds_sum"]
    assert 0 < parts <= whole < 60
    assert fresh.answer("dogs", asked[0])
    wait_until(lambda: values(fresh, **model)["vllm:e2e_request_latency_seconds_count"] == 2)
    assert values(fresh, **model)["vllm:generation_tokens_total"] > used["completion_tokens"]
    assert after["llava_steering_batch_rows_sum"] == after["llava_steering_batch_rows_count"] == 1
    assert after["llava_steering_steps_per_batch_sum"] == used["completion_tokens"]
    reasons = [each.labels["finished_reason"] for each in samples(fresh) if each.name == "vllm:request_success_total"]
    assert reasons and set(reasons) <= {"stop", "length"}


def test_what_runs_and_waits_is_told_with_its_adapters(fresh: Client, worker: Any, asked: list[Question]) -> None:
    held = threading.Event()
    handle = worker.model.lm_head.register_forward_hook(lambda *_: held.wait(60) and None)
    users = []
    try:
        for name in (*["cats"] * LIMITS.running, "dogs"):
            body = asks(asked[0], model=name)
            url = f"{fresh.address}/v1/chat/completions"
            users.append(threading.Thread(target=requests.post, args=(url,), kwargs={"json": body, "timeout": 60}))
            users[-1].start()
            wait_until(
                lambda: (
                    values(fresh)["vllm:num_requests_running"] + values(fresh)["vllm:num_requests_waiting"]
                    == len(users)
                )
            )
        now = values(fresh)
        # How many of them run is for the slots to say.
        assert 1 <= now["vllm:num_requests_running"] <= LIMITS.running and now["vllm:num_requests_waiting"] >= 1
        [info] = [each for each in samples(fresh) if each.name == "vllm:lora_requests_info"]
        assert info.labels["running_lora_adapters"] == "cats"
        assert "dogs" in info.labels["waiting_lora_adapters"].split(",")
    finally:
        held.set()
        handle.remove()
        for user in users:
            user.join()


def test_adapters_and_refusals_are_told(fresh: Client, worker: Any, asked: list[Question]) -> None:
    requests.post(f"{fresh.address}/v1/chat/completions", json=asks(asked[0], model="nobody"), timeout=60)
    requests.post(f"{fresh.address}/worker_generate_stream", json={}, timeout=60)
    now = values(fresh)
    assert now["llava_steering_adapters"] == len(NAMES) and 0 < now["llava_steering_resident_adapters"] <= len(NAMES)
    assert now["llava_steering_rejected_adapters"] == len(worker.catalog.rejected)
    assert values(fresh, status="404")["llava_steering_requests_refused_total"] == 1
    assert values(fresh, status="422")["llava_steering_requests_refused_total"] == 1
