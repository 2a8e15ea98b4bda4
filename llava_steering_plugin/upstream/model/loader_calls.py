"""Call the loader of LLaVA-NeXT as one calls LLaVA's: the two take other arguments.

Which of them is there shows in what its `load_pretrained_model` takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

# Arguments of LLaVA-NeXT's loader; LLaVA's has the first one alone among its further ones.
ATTENTION, OVERWRITE = "attn_implementation", "overwrite_config"
# Its default, which needs a package and a GPU.
FLASH = "flash_attention_2"


def takes_whole_checkpoints_alone(load: Callable[..., Any]) -> bool:
    """Return whether a loader builds LLaVAs from a separate base for Llamas only, and refuses the others."""
    return OVERWRITE in _parameters(load)


def place_like_llava(load: Callable[..., Any], call: inspect.BoundArguments) -> None:
    """Make the arguments that LLaVA's loader takes into those of a loader without `device`.

    - `device` becomes a device map. On the CPU it is "auto", of which LLaVA-NeXT does not conclude "cuda".
    - Where nobody chose an attention, the one of torch is taken if flash attention cannot work.

    Args:
        load: upstream's `load_pretrained_model`.
        call: its arguments, which are changed.
    """
    parameters = _parameters(load)
    if "device" in parameters or OVERWRITE not in parameters:
        return
    more = call.arguments.get("kwargs", {})
    device = more.pop("device", None)
    if device is not None and "device_map" not in call.arguments:
        call.arguments["device_map"] = "auto" if str(device) in ("cpu", "cuda") else {"": str(device)}
    on_cpu = str(device) == "cpu" or call.arguments.get("device_map") in ("cpu", {"": "cpu"})
    if ATTENTION in parameters and ATTENTION not in call.arguments and (on_cpu or find_spec("flash_attn") is None):
        call.arguments[ATTENTION] = "sdpa"


@functools.cache
def _parameters(load: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(load).parameters)
