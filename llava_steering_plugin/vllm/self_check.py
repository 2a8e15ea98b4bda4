"""Checks at an engine's start that MoReS works in it: a lost mask of image tokens would be no error, but other answers.

The engine answers four requests before the first of its clients': a picture and a text, with an adapter that is made
here and without one. It does so where requests are scheduled, so that all its workers, its caches and its graphs take
part, in vLLM's own server as from Python.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
import wrapt
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.engine import EngineCoreRequest, core
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.modes.mores_selection import TokenSelection
from llava_steering_plugin.vllm.adapter import SlotAdapter, SlotLayer, marked
from llava_steering_plugin.vllm.refusals import TARGETS, refused
from llava_steering_plugin.vllm.token_table import table_of
from llava_steering_plugin.vllm.worker import DECODER, forget, hold

SWITCH = "LLAVA_STEERING_VLLM_CHECK"
NAME = "llava-steering-self-check"
NUMBER = 2**31 - 1  # vLLM's server counts its adapters from 1
_REQUEST = LoRARequest(NAME, NUMBER, marked(NAME, "0" * 32))
_LIKELIEST = 5  # tokens whose probabilities are compared
_LAST_CALL = "enable_envs_cache"  # of EngineCore's constructor
_WORDS = 6  # tokens of a prompt beside its image

logger = logging.getLogger("vllm.llava_steering")


class SelfCheckFailed(SteeringError):
    """Raised when an engine would answer wrongly with MoReS adapters."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it: token ids, and what is known of its image, if it has one."""

    ids: list[int]
    features: list[MultiModalFeatureSpec]


def check_at_start() -> None:
    """Have every engine check itself before it is up. Safe to call again."""
    before = EngineCore.__dict__["__init__"]
    if isinstance(before, wrapt.FunctionWrapper):
        return
    EngineCore.__init__ = wrapt.FunctionWrapper(before, _start)
    # In a process that was spawned for an engine, plugins are loaded by the constructor itself, which is not wrapped.
    if (engine := _being_made(before.__code__)) is not None:
        _check_behind(_LAST_CALL, engine)


def _being_made(constructor: CodeType) -> Any:
    """Return the engine whose constructor has called this, however deep; None if none has."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not constructor:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _check_behind(name: str, engine: Any) -> None:
    """Check an engine behind the next call of a function of the module of EngineCore."""
    before = getattr(core, name)

    def once(*args: Any, **kwargs: Any) -> Any:
        setattr(core, name, before)
        done = before(*args, **kwargs)
        _checked(engine)
        return done

    setattr(core, name, once)


def _start(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    before(*args, **kwargs)
    _checked(instance)


def _checked(instance: Any) -> None:
    if os.environ.get(SWITCH) == "0":
        logger.warning("whether MoReS works in this engine is not checked, as %s=0 says", SWITCH)
        return
    try:
        check(instance)
    except SteeringError:
        instance.shutdown()
        raise


def check(engine: Any) -> bool:
    """Check that MoReS steers images, and texts not; return False where the engine has no place for it.

    Args:
        engine: an EngineCore that has nothing to do.

    Raises:
        SelfCheckFailed: it does not, or that could not be found out.
    """
    config = engine.vllm_config
    if config.lora_config is None or refused(config) or config.model_config.runner_type != "generate":
        return False
    if config.model_config.get_multimodal_config().get_limit_per_prompt("image") < 1:
        return False  # no image will come
    started = time.monotonic()
    try:
        if not all(engine.model_executor.collective_rpc(prepare)):
            return False
        picture, text = prompts(config)
        # One text before any steering and one behind a steered picture, whose mask would show if anything were left.
        read = answer(engine, text, None)
        seen, steered = (answer(engine, picture, request) for request in (None, _REQUEST))
        read_steered = answer(engine, text, _REQUEST)
        engine.model_executor.remove_lora(NUMBER)
        engine.model_executor.collective_rpc(release)
    except Exception as error:
        raise SelfCheckFailed(
            f"whether MoReS works in this engine could not be checked ({type(error).__name__}: {error}), so it does "
            f"not start. {_advice()}"
        ) from error
    if torch.equal(seen, steered):
        raise SelfCheckFailed(
            "MoReS does nothing in this engine, so it does not start: a prompt with an image is answered the same "
            f"with a strong steering as without. Adapters would be ignored. {_advice()}"
        )
    if not torch.equal(read, read_steered):
        raise SelfCheckFailed(
            "MoReS changes texts in this engine, so it does not start: a prompt without an image is answered "
            f"otherwise with a steering of image tokens. Adapters would steer the wrong tokens. {_advice()}"
        )
    logger.info("MoReS works in this engine: an image is steered, a text is not (%.1f s)", time.monotonic() - started)
    return True


def _advice() -> str:
    return (
        "Use the version and the settings of vLLM that docs/vllm.md names; with --enforce-eager fewer parts take part. "
        f"{SWITCH}=0 starts it all the same: compare its answers with transformers' then."
    )


def prepare(worker: Any) -> bool:
    """Put the adapter of the check into a worker; return whether its model has places for MoReS."""
    if not getattr(worker.get_model(), "steered", False):
        return False
    slots = worker.model_runner.lora_manager._adapter_manager.modules
    ending = f".{TARGETS[0]}"
    names = [name for name in slots if name.startswith(f"{DECODER}.") and name.endswith(ending)]
    layers = {
        name.removeprefix(f"{DECODER}.").removesuffix(ending): _strong(slots[name].base_layer.input_size)
        for name in names
    }
    hold(worker.model_runner.lora_manager, _REQUEST, SlotAdapter(layers, table_of([TokenSelection.parse("all")])))
    return True


def _strong(width: int) -> SlotLayer:
    """Return a steering of one layer that no answer can miss: a shift by 0.5 in every channel, up or down.

    float16 holds the sum over all layers, and all ranks make the same one.
    """
    signs = torch.randint(0, 2, (1, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return SlotLayer(torch.zeros(1, width), torch.full((1,), width**0.5 / 2), signs / width**0.5, 0)


def release(worker: Any) -> None:
    """Forget the adapter of the check."""
    forget(worker.model_runner.lora_manager, _REQUEST)


def prompts(config: Any) -> tuple[Prompt, Prompt]:
    """Return a prompt with an image and one without, of the tokens of this model.

    Args:
        config: of vLLM, whole.
    """
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    made = processor.get_dummy_mm_inputs({"image": 1})
    place = made["mm_placeholders"]["image"][0]
    words = [number + 3 for number in range(_WORDS)]  # behind the special tokens
    ids = [*words[: _WORDS // 2], *made["prompt_token_ids"][place.offset : place.offset + place.length]]
    moved = type(place)(offset=_WORDS // 2, length=place.length, is_embed=place.is_embed)
    (data,) = made["mm_kwargs"]["image"]
    feature = MultiModalFeatureSpec(data, "image", NAME, moved, NAME)
    return Prompt([*ids, *words[_WORDS // 2 :]], [feature]), Prompt(words, [])


def answer(engine: Any, prompt: Prompt, lora: Any) -> torch.Tensor:
    """Return the likeliest first tokens of an answer and their log probabilities, float64 [2, tokens].

    Args:
        engine: an EngineCore that has nothing to do.
        lora: a LoRARequest, or None.
    """
    name = f"{NAME}-{time.monotonic_ns()}"
    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=_LIKELIEST)
    asked = EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(prompt.ids),
        mm_features=list(prompt.features) or None,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=lora,
        cache_salt=name,  # nothing comes from the prefix cache, and nothing that is left there is used
        data_parallel_rank=None,
    )
    # Not by way of `preprocess_add_request`: its cache of images mirrors that of the engine's clients.
    engine.scheduler.add_request(Request.from_engine_core_request(asked, engine.request_block_hasher))
    found = None
    while engine.scheduler.has_requests() or engine.batch_queue:
        outputs, ran = engine.step_fn()
        engine.post_step(model_executed=ran)
        for each in (outputs or {}).values():
            for output in each.outputs:
                found = output.new_logprobs if output.new_logprobs is not None else found
    if found is None:
        raise RuntimeError("the engine gave no answer")
    return torch.stack([torch.as_tensor(part[0], dtype=torch.float64) for part in found[:2]])
