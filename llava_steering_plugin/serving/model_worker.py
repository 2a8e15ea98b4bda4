"""Upstream's ModelWorker, answering each request with the adapter it asks for.

`generate_stream` is upstream's, as it is. It runs on a shallow copy of the worker, one for each request, whose model
forwards everything to the one model but says which adapter is meant, stops when the client has gone, and ends the
stream of text whatever happens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
import threading
from argparse import Namespace
from asyncio import Semaphore
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava import utils as upstream_utils
from transformers import StoppingCriteria

from llava_steering_plugin.adapters.base_model import read_config
from llava_steering_plugin.adapters.locate import find
from llava_steering_plugin.errors import ArgumentsError, SteeringError, UpstreamError
from llava_steering_plugin.inference.base_model import loading_name
from llava_steering_plugin.pool.pool import AdapterPool
from llava_steering_plugin.serving.catalog import AdapterCatalog
from llava_steering_plugin.serving.http.protocol import FAILED, GONE, NO_ANSWER, chunk
from llava_steering_plugin.serving.http.validation import CheckedRequest, unpacked

# Importing upstream's worker would turn standard output and error into log records, and start a log file in the current
# folder. Both stay with whoever runs the program.
upstream_utils.handler = upstream_utils.handler or logging.NullHandler()
with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
    from llava.mm_utils import get_model_name_from_path
    from llava.serve import model_worker as upstream
upstream.logger.setLevel(logging.WARNING)  # or a line for each heart beat

logger = logging.getLogger(__name__)


class PatientStreamer(upstream.TextIteratorStreamer):
    """Waits as long as generating takes. Upstream's gives up when no text comes for 15 seconds.

    That can be a long prefill, or a machine with much to do. `_AskedModel` ends the stream in every case.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"timeout": None}))


class ClientGone(StoppingCriteria):
    """Ends a generation before its next token once nobody waits for it."""

    def __init__(self, gone: threading.Event):
        self.gone = gone

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
        return self.gone.is_set()


class Generating:
    """What upstream starts as a thread for every generation: here a thread that stays takes it.

    Each thread leaves memory of its own behind in the libraries that compute.

    Attributes:
        threads: as many as the server has slots, once `AdapterWorker.report` knows how many. A slot is free a moment
            before its thread, when that has ended the stream: the next generation then waits for the moment.
    """

    threads = ThreadPoolExecutor(thread_name_prefix="generating")

    def __init__(self, *, target: Callable[..., Any], kwargs: dict[str, Any]):
        self._work = functools.partial(target, **kwargs)

    def start(self) -> None:
        """Raises RuntimeError if the system has no more threads; the work may be done all the same, later."""
        self.threads.submit(self._work)


class _AskedModel:
    """The model as one request sees it.

    Attributes:
        failed: what to tell the client if something ended the generation early. Not the exception: it would hold this
            object, with the images, in a circle.
    """

    def __init__(self, model: Any, adapter: str, gone: threading.Event):
        self._model = model
        self._adapter = adapter
        self._gone = gone
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """What upstream starts as a thread of its own: an exception here would reach nobody."""
        criteria = [*(kwargs.pop("stopping_criteria", None) or ()), ClientGone(self._gone)]
        streamer = kwargs["streamer"]
        try:
            if not self._gone.is_set():
                self._model.generate(*args, stopping_criteria=criteria, adapter_names=self._adapter, **kwargs)
        except SteeringError as error:
            # Of the arguments only the adapter's name can be wrong by now: it was removed while the request waited.
            self.failed = GONE if isinstance(error, ArgumentsError) else NO_ANSWER
            logger.warning("an answer failed: %s: %s", type(error).__name__, error)
        except Exception:
            self.failed = NO_ANSWER
            logger.exception("an answer failed")
        finally:
            streamer.text_queue.put(streamer.stop_signal)


class AdapterWorker(upstream.ModelWorker):
    """One base model and a pool of adapters on it, each a model of its own to the controller.

    Args:
        model_path: the base, a folder or a hub id.
        model_name: the name that the page shows for the base; None: the one that upstream would give it.

    Raises:
        ArgumentsError: `model_path` is an adapter.
        UpstreamError: there is no model at `model_path`.
    """

    def __init__(
        self,
        model_path: str,
        *,
        controller: str,
        address: str,
        model_name: str | None = None,
        device: str = "cuda",
        load_8bit: bool = False,
        load_4bit: bool = False,
        max_resident: int | None = None,
    ):
        if find(model_path) is not None:
            raise ArgumentsError(
                f"{model_path} is an adapter. Give its base as the base (--model-path; `serve`'s first word) and the "
                "adapter with --adapters."
            )
        upstream.TextIteratorStreamer = PatientStreamer
        upstream.Thread = Generating
        upstream.load_image_from_base64 = unpacked
        super().__init__(
            controller,
            address,
            upstream.worker_id,
            True,  # no_register: the adapters are not there yet, and upstream's heart beat would outlive a shutdown
            model_path,
            None,
            _loading_name(model_path),
            load_8bit,
            load_4bit,
            device,
        )
        self.model_name = model_name or get_model_name_from_path(model_path)
        self.is_multimodal = self.image_processor is not None
        self.pool = AdapterPool(self.model, self.tokenizer, max_resident=max_resident)
        self.catalog = AdapterCatalog(self.pool, self.model_name)

    def get_status(self) -> dict[str, Any]:
        """What the controller is told: every adapter, and the base, is a model."""
        return {**super().get_status(), "model_names": self.catalog.names()}

    def report(self, slots: Semaphore, limit: int) -> None:
        """Has the controller told how many of `limit` slots are taken, and how many requests wait for one.

        As many generations run at a time.
        """
        # Upstream's functions read these as globals of their module, where its own program would have put them.
        upstream.model_semaphore = slots
        upstream.args = Namespace(limit_model_concurrency=limit)
        Generating.threads = ThreadPoolExecutor(limit, "generating")

    def answer(self, asked: CheckedRequest, gone: threading.Event) -> Iterator[bytes]:
        """The states of one answer, each the whole text so far, as upstream's worker streams them.

        Args:
            gone: set it when nobody waits any more; generating ends then.
        """
        view = copy.copy(self)
        view.model = model = _AskedModel(self.model, asked.adapter, gone)
        try:
            yield from view.generate_stream_gate(asked.parameters)
            if model.failed is not None:
                yield chunk(model.failed, FAILED)
        finally:
            gone.set()


def _loading_name(model_path: str) -> str:
    try:
        return loading_name(model_path, read_config(model_path))
    except SteeringError as error:
        raise UpstreamError(f"there is no model at {model_path}: {error} Give the base with --model-path.") from error
