"""Upstream's ModelWorker, answering each request with the adapter that it names.

`generate_stream` is upstream's, unchanged. It runs on a shallow copy of the worker, one for each request. The copy's
model forwards everything to the one model, but passes the adapter's name, stops when the client has gone, and ends the
stream of text whatever happens.
"""

from __future__ import annotations

import base64
import copy
import io
import logging
import threading
from asyncio import Semaphore
from collections.abc import Iterator
from typing import Any

from llava.mm_utils import get_model_name_from_path, tokenizer_image_token

from llava_steering_plugin.errors import ArgumentsError, NotFiniteError, SteeringError
from llava_steering_plugin.inference.base_files import check_base
from llava_steering_plugin.inference.base_model import loading_name
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import image_size
from llava_steering_plugin.inference.sources import shown_base
from llava_steering_plugin.inference.squares import process_images
from llava_steering_plugin.pool.pool import AdapterPool
from llava_steering_plugin.serving.catalog import AdapterCatalog
from llava_steering_plugin.serving.http.protocol import FAILED, GONE, NO_ANSWER, NOT_FINITE, REFUSED, chunk
from llava_steering_plugin.serving.http.validation import CheckedRequest, decode_image
from llava_steering_plugin.upstream.text.conversations import marked_as
from llava_steering_plugin.upstream.worker_seam import ClientGone, model_worker, replace_parts, set_globals

logger = logging.getLogger(__name__)


class RequestModel:
    """The model as upstream's code sees it while it answers one request.

    Attributes:
        failed: what to tell the client if something ended the generation early. Not the exception: it would keep this
            object, with the images, in a circle of references.
    """

    def __init__(self, model: Any, adapter: str, gone: threading.Event):
        self._model = model
        self._adapter = adapter
        self._gone = gone
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """Generate with the adapter; log what is raised, because upstream calls this in a thread of its own."""
        criteria = [*(kwargs.pop("stopping_criteria", None) or ()), ClientGone(self._gone)]
        streamer = kwargs["streamer"]
        try:
            if not self._gone.is_set():
                self._model.generate(*args, stopping_criteria=criteria, adapter_names=self._adapter, **kwargs)
        except SteeringError as error:
            # Only the adapter's name can be wrong by now: it was removed while the request waited.
            known = {ArgumentsError: GONE, NotFiniteError: NOT_FINITE}
            self.failed = known.get(type(error), NO_ANSWER)
            logger.warning("an answer failed: %s: %s", type(error).__name__, error)
        except Exception:
            self.failed = NO_ANSWER
            logger.exception("an answer failed")
        finally:
            streamer.finish()


class AdapterWorker(model_worker.ModelWorker):
    """Serves one base model and a pool of adapters on it; to the controller each of them is a model of its own.

    Args:
        model_path: the base, a folder or a hub id.
        controller, address: URLs of the controller and of this worker.
        model_name: the name of the base on the page; None: the one that upstream would give it.

    Raises:
        ArgumentsError: `model_path` is an adapter, or no LLaVA.
        UpstreamError: there is no model at `model_path`, or files of it are missing.
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
        config = check_base(model_path, " Give the base with --model-path.")
        replace_parts(decode_image, process_images)
        super().__init__(
            controller,
            address,
            model_worker.worker_id,
            True,  # no_register: the adapters are not there yet, and upstream's heart beat would outlive a shutdown
            model_path,
            None,
            loading_name(model_path, config),
            load_8bit,
            load_4bit,
            device,
        )
        self.model_name = model_name or shown_base(get_model_name_from_path(model_path), config)
        self.is_multimodal = self.image_processor is not None
        self.pool = AdapterPool(self.model, self.tokenizer, max_resident=max_resident)
        self.catalog = AdapterCatalog(self.pool, self.model_name)

    def get_status(self) -> dict[str, Any]:
        """Return what the controller is told: the base and every adapter are models."""
        return {**super().get_status(), "model_names": self.catalog.names()}

    def share_slots(self, slots: Semaphore, limit: int) -> None:
        """Tell the controller how many of `limit` slots are taken and how many requests wait for one.

        As many generations run at a time.
        """
        set_globals(slots, limit)

    def _too_long(self, parameters: dict[str, Any]) -> str | None:
        """Return what to tell the client of a prompt that upstream would cut, or answer with nothing; None if it fits.

        Upstream cuts the end off where there are images, and streams the refusal of longer prompts as an answer.
        """
        images = parameters["images"]
        sizes = [image_size(io.BytesIO(base64.b64decode(image))) for image in images]
        ids = tokenizer_image_token(
            marked_as(parameters["prompt"], self.model.config) if images else parameters["prompt"], self.tokenizer
        )
        tokens = PromptTokens.of_model(self.model)
        length, most = tokens.count(ids, sizes), tokens.context.prompt(bool(images))
        if most is None or length <= most:
            return None
        return f"The conversation has {length:,} tokens; this model takes {most:,}. Please start a new one."

    def answer(self, request: CheckedRequest, gone: threading.Event) -> Iterator[bytes]:
        """Yield the states of one answer, each with the whole text so far, as upstream's worker streams them.

        Args:
            gone: set it when the client has gone; generating ends then.
        """
        problem = self._too_long(request.parameters)
        if problem is not None:
            logger.info("refused: %s", problem)
            yield chunk(problem, REFUSED)
            return
        view = copy.copy(self)
        view.model = model = RequestModel(self.model, request.adapter, gone)
        try:
            yield from view.generate_stream_gate(request.parameters)
            if model.failed is not None:
                yield chunk(model.failed, FAILED)
        finally:
            gone.set()
