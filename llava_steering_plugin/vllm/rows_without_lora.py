"""Mends vLLM's LoRAs on the CPU, where rows of the base took whatever LoRA lay in the last slot.

vLLM gives tokens without a LoRA the slot -1. Its kernels for GPUs skip these; its operators for the CPU use the number
as an index, and -1 is the last slot (https://github.com/vllm-project/vllm/pull/48421). There it does no harm while the
slot has no weights for a linear, so it shows beside PEFT's LoRAs only, and only where one of them fills the last slot.
"""

from __future__ import annotations

from typing import Any

import torch
import wrapt
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

# Those that take a slot for each row; the others of the module call them.
OPERATORS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def leave_rows_without_lora() -> None:
    """Wrap the operators for the CPU so that rows without a LoRA stay as they are. Safe to call again."""
    for name in OPERATORS:
        operator = getattr(lora_ops, name)
        if not isinstance(operator, wrapt.FunctionWrapper):
            operator = wrapt.FunctionWrapper(operator, _rows_with_lora)
        for module in (lora_ops, punica_cpu):
            setattr(module, name, operator)


def _rows_with_lora(before: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs, weights, output, slots, *rest = args
    untouched = output.clone()
    before(inputs, weights, output, slots.clamp(min=0), *rest, **kwargs)
    # Chosen, and not multiplied by 0: the weights in slot 0 are somebody's, and may not be finite.
    output.copy_(torch.where((slots >= 0)[:, None], output, untouched))
