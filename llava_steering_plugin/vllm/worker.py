"""Lets vLLM's workers load our adapters into their LoRA slots; all other LoRAs go the way they went."""

from __future__ import annotations

from typing import Any

import torch
import wrapt
from vllm.lora import worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.vllm.adapter import (
    SlotAdapter,
    for_slot,
    read_checked,
    refuse_all,
    turn_of,
    unmarked,
    unsupported,
)

DECODER, BESIDE_IT, PROJECTOR = "language_model.model", "language_model", "multi_modal_projector"
# vLLM does not say which adapters have been unloaded. They have one to four megabytes, and 40 to 60 with a projector.
MOST_KEPT = 4 << 30


def read_our_adapters() -> None:
    """Wrap the methods that load a LoRA from its folder. Safe to call again."""
    for owner, method, wrapper in (
        (worker_manager.WorkerLoRAManager, "_load_adapter", _load_adapter),
        (worker_manager.WorkerLoRAManager, "add_adapter", _add_adapter),
        (worker_manager.LRUCacheWorkerLoRAManager, "add_adapter", _add_adapter),
    ):
        before = owner.__dict__[method]
        if not isinstance(before, wrapt.FunctionWrapper):
            setattr(owner, method, wrapt.FunctionWrapper(before, wrapper))


def _load_adapter(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    request = args[0] if args else kwargs["lora_request"]
    if unmarked(request.lora_path)[1] is None:
        return before(*args, **kwargs)
    return load(request, instance)


def _add_adapter(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take an adapter out of its slot first if the request is for other contents: vLLM knows adapters by number.

    A request that began, or came, before an adapter was replaced goes on with the new one.
    """
    request = args[0] if args else next(iter(kwargs.values()))
    if unmarked(request.lora_path)[1] is None:
        return before(*args, **kwargs)
    loaded, number = _loaded(instance), request.lora_int_id
    current = loaded.get(number)
    if current is not None and current != request.lora_path:
        if turn_of(current) > turn_of(request.lora_path):
            request = type(request)(request.lora_name, number, current, request.base_model_name)
        else:
            _read(instance, request)  # what cannot be read changes nothing
            instance._adapter_manager.remove_adapter(number)
    done = before(request)
    loaded[number] = request.lora_path
    return done


def _loaded(manager: Any) -> dict[int, str]:
    """Return the marked paths of the adapters that a worker has loaded last, by their number."""
    loaded: dict[int, str] = manager.__dict__.setdefault("_llava_steering_loaded", {})
    return loaded


def _kept(manager: Any) -> dict[str, SlotAdapter]:
    """Return the adapters that a worker has read, by the hash of their contents; the latest last."""
    kept: dict[str, SlotAdapter] = manager.__dict__.setdefault("_llava_steering", {})
    return kept


def hold(manager: Any, request: Any, adapter: SlotAdapter) -> None:
    """Keep an adapter that is in no folder; `request` loads it."""
    _kept(manager)[_digest(request)] = adapter


def forget(manager: Any, request: Any) -> None:
    """Keep an adapter no longer."""
    _kept(manager).pop(_digest(request), None)
    _loaded(manager).pop(request.lora_int_id, None)


def load(request: Any, manager: Any) -> Any:
    """Return an adapter of ours as a LoRA of vLLM's.

    What was read is kept: a slot that is filled again, in the midst of a pass, finds it though the folder may have
    changed or be gone. An error there would end the engine.

    Args:
        request: a LoRARequest whose path has the hash of the adapter (`requests.py`).
        manager: the WorkerLoRAManager.

    Raises:
        AdapterError: neither the folder nor a copy holds that adapter, or it does not fit the model.
    """
    return _as_lora(request, _read(manager, request), manager._adapter_manager)


def _read(manager: Any, request: Any) -> SlotAdapter:
    kept, digest = _kept(manager), _digest(request)
    found = kept.pop(digest, None)
    if found is None:
        folder = unmarked(request.lora_path)[0]
        stored = read_checked(folder, digest)
        refuse_all(unsupported(stored), request.lora_name, folder)
        found = for_slot(stored)
    keep(kept, digest, found)
    return found


def _digest(request: Any) -> str:
    digest = unmarked(request.lora_path)[1]
    assert digest is not None
    return digest


def keep(kept: dict[str, SlotAdapter], digest: str, found: SlotAdapter) -> None:
    """Put an adapter behind those that are kept, and give up the oldest where all take more than MOST_KEPT bytes."""
    kept[digest] = found
    sizes = {each: adapter.size for each, adapter in kept.items()}
    for oldest in list(kept)[:-1]:
        if sum(sizes.values()) <= MOST_KEPT:
            return
        del kept[oldest], sizes[oldest]


def _as_lora(request: Any, adapter: SlotAdapter, slots: Any) -> Any:
    from llava_steering_plugin.vllm.layers import STEERING, TOKENS, packed
    from llava_steering_plugin.vllm.model import IN_SLOTS

    table = f"{BESIDE_IT}.{TOKENS}"
    loras = {table: LoRALayerWeights(table, 1, 1, adapter.table, torch.zeros(1, 1))}
    for path, layer in adapter.layers.items():
        name, rank = f"{DECODER}.{path}.{STEERING}", len(layer.offset)
        states = packed(layer.shift, layer.offset, layer.selection)
        loras[name] = LoRALayerWeights(name, rank, rank, states, layer.basis.T.contiguous())
    if any(linear is not None for linear in adapter.projector):
        name = f"{PROJECTOR}.{STEERING}"
        # What is kept, without a copy.
        first, second = (torch.zeros(1, 1) if linear is None else linear for linear in adapter.projector)
        loras[name] = LoRALayerWeights(name, 1, 1, first, second)
    if missing := [name for name in loras if not isinstance(slots.modules.get(name), IN_SLOTS)]:
        raise AdapterError(
            f"the adapter {request.lora_name!r} cannot run in this vLLM: its model has no place for MoReS at "
            f"{missing[0]}. Start vLLM on the base that `llava-steering export` wrote."
        )
    return LoRAModel(request.lora_int_id, max(lora.rank for lora in loras.values()), loras)
