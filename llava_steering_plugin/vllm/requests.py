"""Checks our adapters where requests come in, before a worker sees them, and marks each with the hash of its contents.

An adapter that fails in a worker, in the midst of a pass, would end the engine. And vLLM's prefix cache knows an
adapter by its name and path: without the hash, one that was trained again would get what the old one has left there.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import wrapt
from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from llava_steering_plugin.adapters.fit.compatibility import mode_of
from llava_steering_plugin.adapters.stored.folder import AdapterFolder, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import AdapterError, SteeringError
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.vllm.adapter import (
    linears_and_others,
    marked,
    name_of_features,
    read_marked,
    refuse_all,
    unmarked,
    unsupported,
    unsupported_by,
)
from llava_steering_plugin.vllm.base import ServedBase
from llava_steering_plugin.vllm.copies import copy
from llava_steering_plugin.vllm.refusals import PROJECTORS, refused

logger = logging.getLogger("vllm.llava_steering")


class Admission:
    """Knows which adapters have been checked for one engine.

    Args:
        vllm_config: of the engine.
    """

    def __init__(self, vllm_config: Any):
        self._vllm_config = vllm_config
        self._base: ServedBase | None = None
        self._marked: dict[tuple[str, int, str], str] = {}
        self._latest: dict[int, tuple[str, str]] = {}  # by the adapter's number: what was checked last, and its mark
        self._turn = 0
        self._lock = threading.Lock()

    def admit(self, request: Any, *, anew: bool = False) -> Any:
        """Return a request for an adapter of ours with the marked path; any other request as it is.

        Args:
            request: a LoRARequest, or None.
            anew: read the folder although an adapter of this name, number and path is known.

        Raises:
            VLLMValidationError: the adapter cannot run in this engine; all problems at once.
            LoRAAdapterNotFoundError: there is no such folder.
        """
        if request is None or unmarked(request.lora_path)[1] is not None:
            return request
        key = (request.lora_name, request.lora_int_id, request.lora_path)
        with self._lock:
            if anew or key not in self._marked:
                try:
                    self._marked[key] = self._checked(request)
                except SteeringError as error:
                    logger.warning("refused: %s", error)  # vLLM leaves paths out of what it tells clients
                    raise VLLMValidationError(str(error)) from error
            path = self._marked[key]
        if path == request.lora_path:
            return request
        # Without load_inplace, with which vLLM reads an adapter again for every pass: the path says what is loaded.
        return type(request)(request.lora_name, request.lora_int_id, path, request.base_model_name)

    def _checked(self, request: Any) -> str:
        folder = find(request.lora_path)
        if folder is None:
            if os.path.isabs(request.lora_path) and not os.path.isdir(request.lora_path):
                # What vLLM's own loading says of it, but in the midst of a pass.
                raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
            return str(request.lora_path)
        try:
            return self._checked_folder(request, folder)
        except SteeringError as error:
            if repr(request.lora_name) in str(error):
                raise
            raise AdapterError(f"the adapter {request.lora_name!r} cannot run in this vLLM: {error}") from error

    def _checked_folder(self, request: Any, folder: AdapterFolder) -> str:
        refuse_all(refused(self._vllm_config), request.lora_name, folder)
        if self._base is None:
            self._base = ServedBase.of(self._vllm_config.model_config)
        try:
            folder.read(self._base.check)
        except SteeringError:
            refuse_all(unsupported_by(folder.config), request.lora_name, folder)  # perhaps it does not fit for that
            raise
        stored, digest = read_marked(folder.path)
        own_projector = bool(linears_and_others(stored)[0])
        problems = [*unsupported(stored), *self._too_large(stored)]
        if own_projector:
            problems += self._without_projectors()
        refuse_all(problems, request.lora_name, folder)
        self._base.check_weights(stored)
        copy(folder.path, digest)
        return self._marked_anew(request.lora_int_id, folder.path, digest, own_projector)

    def _marked_anew(self, number: int, folder: Path, digest: str, own_projector: bool) -> str:
        checked = f"{folder} {digest}"
        if (latest := self._latest.get(number)) is not None and latest[0] == checked:
            return latest[1]
        self._turn += 1
        path = marked(folder, digest, self._turn, own_projector=own_projector)
        self._latest[number] = checked, path
        return path

    def _without_projectors(self) -> list[str]:
        brings, images = "it brings a projector of its own", self._vllm_config.model_config.get_multimodal_config()
        problems = []
        if not self._vllm_config.lora_config.enable_tower_connector_lora:
            problems.append(f"{brings}: start vLLM with {PROJECTORS}")
        if images.get_limit_per_prompt("image") < 1:
            problems.append(f"{brings}, and this vLLM takes no images")
        if images.enable_mm_embeds:
            problems.append(
                f"{brings}, and with --enable-mm-embeds vLLM does not always say whose an image is: start it without"
            )
        return problems

    def _too_large(self, stored: StoredAdapter) -> list[str]:
        most = self._vllm_config.lora_config.max_lora_rank
        mode = mode_of(stored.config) if stored.config.mode == MoReS.name else None
        if isinstance(mode, MoReS) and mode.rank > most:
            return [f"its rank is {mode.rank}: start vLLM with --max-lora-rank {mode.rank} or more, not {most}"]
        return []


def admission_of(engine: Any) -> Admission:
    """Return the admission of an engine, or of its InputProcessor."""
    processor = getattr(engine, "input_processor", engine)
    found: Admission = processor.__dict__.setdefault("_llava_steering", Admission(processor.vllm_config))
    return found


def check_requests() -> None:
    """Wrap the methods by which requests and adapters come into an engine. Safe to call again."""
    for owner, method, wrapper in (
        (InputProcessor, "process_inputs", _process_inputs),
        (InputProcessor, "_get_mm_identifier", _name_image),
        (AsyncLLM, "add_lora", _add_lora),
        (LLMEngine, "add_lora", _add_lora),
    ):
        before = owner.__dict__[method]
        if not isinstance(before, wrapt.FunctionWrapper):
            setattr(owner, method, wrapt.FunctionWrapper(before, wrapper))


def _process_inputs(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if (request := kwargs.get("lora_request")) is not None:
        try:
            kwargs = kwargs | {"lora_request": admission_of(instance).admit(request, anew=request.load_inplace)}
        except (VLLMValidationError, LoRAAdapterNotFoundError):
            _forget_images(instance, args[1] if len(args) > 1 else kwargs["prompt"])
            raise
    return before(*args, **kwargs)


def _forget_images(processor: Any, prompt: Any) -> None:
    """Have vLLM send the images of a refused prompt again: they count as sent, and the next request would miss them."""
    cache = processor.renderer.mm_processor_cache
    if cache is not None and isinstance(prompt, dict):
        for hashes in prompt.get("mm_hashes", {}).values():
            for each in hashes:
                cache.invalidate(each)


def _name_image(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Name the features of an image by the contents of an adapter that has a projector of its own.

    vLLM caches features under this name, in which it puts the name of the LoRA. So would those of an adapter that was
    trained again be the old ones, and images be projected again for every adapter that leaves them as they are.
    """
    image, request = args
    adapter = None if request is None else name_of_features(request.lora_path)
    if adapter is None:
        return before(*args, **kwargs)
    return f"{adapter}:{image}" if adapter else image


def _add_lora(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    request = kwargs["lora_request"] if "lora_request" in kwargs else args[0]
    admitted = admission_of(instance).admit(request, anew=True)
    if admitted is not request:
        request.load_inplace = False  # it is loaded, once, and not again for every request that has it
    return before(admitted)
