"""Counts for Prometheus what a worker does, under vLLM's names where it has one: so its dashboards serve here, too.

Counted are all answers, those to LLaVA's page as those of the API.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import Event, Piece

if TYPE_CHECKING:
    from llava_steering_plugin.serving.http.admission import Admission
    from llava_steering_plugin.serving.model_worker import AdapterWorker

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0),
)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass
class _Progress:
    """How far an answer is: when it was asked for, when its last tokens came, and how many there were."""

    asked: float = field(default_factory=time.monotonic)
    last: float | None = None
    tokens: int = 0


class Metrics(Collector):
    """Counts, and reads what there is at a moment. It observes the slots of the worker.

    Attributes:
        refused: requests that were answered with an error, by status.
    """

    def __init__(self, worker: AdapterWorker, admission: Admission):
        self._worker = worker
        self._slots = admission.slots
        self._registry = CollectorRegistry()
        self._progress: WeakKeyDictionary[Answer, _Progress] = WeakKeyDictionary()
        self._labels = {"model_name": worker.catalog.base, "engine": "0"}
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Time to the first token, in seconds.")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Time between tokens, in seconds.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Time of a whole answer, in seconds.")
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts, images included.")
        self._made = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = self._counter("vllm:request_success", "Answers that came to their end.", "finished_reason")
        self._rows = self._histogram("llava_steering_batch_rows", "Answers generated in one batch.", ROWS)
        self._steps = self._histogram("llava_steering_steps_per_batch", "Passes of the model in one batch.", STEPS)
        self.refused = Counter(
            "llava_steering_requests_refused", "Requests answered with an error.", ["status"], registry=self._registry
        )
        self._registry.register(self)
        self._slots.observer = self

    def asked(self, answer: Answer) -> None:
        """Note that an answer has been asked for."""
        self._progress[answer] = _Progress()

    def event(self, answer: Answer, event: Event) -> None:
        """Count an event of an answer, from any thread."""
        now, progress = time.monotonic(), self._progress.get(answer)
        if progress is None:
            return
        tokens = event.tokens if isinstance(event, Piece) else event.completion_tokens
        new = max(tokens - progress.tokens, 0)
        if new and progress.last is None:
            self._first.observe(now - progress.asked)
        elif new and progress.last is not None:
            for _ in range(new):
                self._between.observe((now - progress.last) / new)
        if new:
            progress.last, progress.tokens = now, tokens
            self._made.inc(new)
        if not isinstance(event, Piece):
            self._prompt.inc(event.prompt_tokens)
            if event.finish_reason in ("stop", "length"):
                self._ended.labels(**self._labels, finished_reason=event.finish_reason).inc()
                self._whole.observe(now - progress.asked)

    def generated(self, rows: int, steps: int) -> None:
        """Count a batch that has been generated, from any thread."""
        self._rows.observe(rows)
        self._steps.observe(steps)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what there is at this moment; in the event loop."""
        catalog, pool = self._worker.catalog, self._worker.pool
        running, waiting = list(self._slots.running), list(self._slots.waiting)
        yield self._gauge("vllm:num_requests_running", "Answers that are being generated.", len(running))
        yield self._gauge("vllm:num_requests_waiting", "Answers that wait for their turn.", len(waiting))
        names = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters that are asked, and when.", labels=names)
        adapters = [adapter.name for adapter in catalog.adapters()]
        info.add_metric([str(len(adapters)), _listed(waiting), _listed(running)], time.time())
        yield info
        yield self._gauge("llava_steering_adapters", "Adapters that are served.", len(adapters))
        resident = sum(_is_resident(pool, name) for name in adapters)
        yield self._gauge("llava_steering_resident_adapters", "Adapters on the device.", resident)
        rejected = len(catalog.rejected)
        yield self._gauge("llava_steering_rejected_adapters", "Adapters that could not be loaded.", rejected)

    async def answer(self, request: Request) -> Response:
        """Answer GET /metrics."""
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _histogram(self, name: str, text: str, buckets: Iterable[float] = SECONDS) -> Any:
        made = Histogram(name, text, list(self._labels), registry=self._registry, buckets=tuple(buckets))
        return made.labels(**self._labels)

    def _counter(self, name: str, text: str, *more: str) -> Any:
        made = Counter(name, text, [*self._labels, *more], registry=self._registry)
        return made if more else made.labels(**self._labels)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


class CountRefusals:
    """Counts answers with an error status, in front of an ASGI application."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.metrics.refused.labels(status=str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


def _listed(answers: Iterable[Answer]) -> str:
    names = {answer.adapter for answer in answers}
    return ",".join(sorted(names - {BASE}))


def _is_resident(pool: Any, name: str) -> bool:
    try:
        return bool(pool.details(name).resident)
    except SteeringError:  # removed in the meantime
        return False
