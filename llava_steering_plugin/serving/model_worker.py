"""Upstream's ModelWorker, answering each request with the adapter that it names.

`generate_stream` is upstream's, unchanged. It runs on a shallow copy of the worker, one for each answer. The copy's
model forwards everything to the one model, but passes the adapter's name, stops when nobody wants the answer any more,
and ends the stream of text whatever happens.
"""

from __future__ import annotations

import copy
import io
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from transformers import StoppingCriteria

from llava_steering_plugin.errors import ArgumentsError, NotFiniteError, SteeringError
from llava_steering_plugin.inference.base_files import check_base
from llava_steering_plugin.inference.base_model import loading_name
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import image_size
from llava_steering_plugin.inference.sources import shown_base
from llava_steering_plugin.inference.squares import process_images
from llava_steering_plugin.pool.pool import AdapterPool
from llava_steering_plugin.serving.catalog import AdapterCatalog
from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import (
    GONE,
    NO_ANSWER,
    NOT_FINITE,
    End,
    FinishReason,
    GenerationRequest,
    Piece,
    Problem,
)
from llava_steering_plugin.serving.generation.slots import Slots
from llava_steering_plugin.serving.http.validation import decode_image
from llava_steering_plugin.upstream.text.conversations import marked_as
from llava_steering_plugin.upstream.worker_seam import model_worker, replace_parts, set_threads

logger = logging.getLogger(__name__)


class RequestModel:
    """The model as upstream's code sees it while it answers one request.

    Attributes:
        end: the end of the answer, once it is made.
    """

    def __init__(self, model: Any, answer: Answer, adapter: str):
        self._model = model
        self._answer = answer
        self._adapter = adapter
        self.tokens = 0
        self.end = End("cancelled")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """Generate with the adapter; log what is raised, because upstream calls this in a thread of its own."""
        criteria = [*(kwargs.pop("stopping_criteria", None) or ()), Following(self, self._answer)]
        streamer = kwargs["streamer"]
        try:
            if not (self._answer.cancelled or self._answer.ended):
                self._model.generate(*args, stopping_criteria=criteria, adapter_names=self._adapter, **kwargs)
                full = self.tokens >= kwargs["max_new_tokens"]
                reason: FinishReason = "cancelled" if self._answer.cancelled else "length" if full else "stop"
                self.end = End(reason, completion_tokens=self.tokens)
        except SteeringError as error:
            # Only the adapter's name can be wrong by now: it was removed while the request waited.
            known = {ArgumentsError: (Problem.GONE, GONE), NotFiniteError: (Problem.NOT_FINITE, NOT_FINITE)}
            self._fail(*known.get(type(error), (Problem.FAILED, NO_ANSWER)))
            logger.warning("an answer failed: %s: %s", type(error).__name__, error)
        except Exception:
            self._fail(Problem.FAILED, NO_ANSWER)
            logger.exception("an answer failed")
        finally:
            streamer.finish()

    def _fail(self, problem: Problem, message: str) -> None:
        self.end = End("error", completion_tokens=self.tokens, problem=problem, message=message)


class Following(StoppingCriteria):
    """Counts the tokens of an answer, and ends it before its next token once nobody wants it."""

    def __init__(self, model: RequestModel, answer: Answer):
        self._model, self._answer = model, answer

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
        self._model.tokens += 1
        return self._answer.cancelled


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
        self.slots: Slots | None = None

    def get_status(self) -> dict[str, Any]:
        """Return what the controller is told: the base and every adapter are models."""
        return {**super().get_status(), "model_names": self.catalog.names()}

    def get_queue_length(self) -> int:
        """Return how many answers are being made or wait; the controller asks the worker with the fewest."""
        return self.slots.taken + len(self.slots.waiting) if self.slots is not None else 0

    def open_slots(self, count: int, changed: Callable[[], None]) -> Slots:
        """Make answers from now on, `count` at a time; for the event loop."""
        set_threads(count)
        self.slots = Slots(self.make, count, changed)
        return self.slots

    def _length(self, request: GenerationRequest) -> tuple[int, int | None]:
        """Return how many tokens a prompt has, and how many it may have; None: any number.

        Upstream cuts the end off where there are images, and streams the refusal of longer prompts as an answer.
        """
        sizes = [image_size(io.BytesIO(image)) for image in request.images]
        prompt = request.prompt
        if isinstance(prompt, str):
            prompt = tokenizer_image_token(marked_as(prompt, self.model.config) if sizes else prompt, self.tokenizer)
        tokens = PromptTokens.of_model(self.model)
        return tokens.count(prompt, sizes), tokens.context.prompt(bool(sizes))

    def make(self, answer: Answer) -> None:
        """Make one answer in this thread."""
        request = answer.request
        assert request is not None
        length, most = self._length(request)
        if most is not None and length > most:
            message = f"The conversation has {length:,} tokens; this model takes {most:,}. Please start a new one."
            logger.info("refused: %s", message)
            answer.put(End("error", prompt_tokens=length, problem=Problem.TOO_LONG, message=message))
            return
        view = copy.copy(self)
        view.model = model = RequestModel(self.model, answer, request.adapter)
        sent = len(str(request.prompt))
        for state in view.generate_stream_gate(_parameters(request)):
            text = json.loads(state[:-1])
            if text["error_code"]:
                answer.put(End("error", length, model.tokens, Problem.FAILED, NO_ANSWER))
                return
            answer.put(Piece(text["text"][sent:], model.tokens))
            sent = len(text["text"])
        answer.put(replace(model.end, prompt_tokens=length))


def _parameters(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields that upstream's `generate_stream` reads."""
    return {
        "prompt": request.prompt,
        "images": request.images,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_new_tokens": request.max_new_tokens,
        "stop": request.stop[0],
    }
