"""Have flash attention computed by PyTorch's own function for a while: its kernels show no attention to anybody.

The model goes on as it is. Until transformers 4.43 an attention layer gives its queries, keys and values to its method
`_flash_attention_forward`, which takes them through flash-attn; here that method alone is replaced. Later versions ask
the config at every call which function computes the attention; here it names another one. Classes, flags, caches,
adapters and hooks, those of accelerate too, are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_steering_plugin.hooks.decoder import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where a layer of transformers 4 keeps its call of flash-attn, and where a config keeps the name of the function.
_CALL = "_flash_attention_forward"
_NAME = "_attn_implementation_internal"


@contextmanager
def without_flash(model: PreTrainedModel) -> Iterator[None]:
    """Compute the flash attention of a model's decoder by `scaled_dot_product_attention` inside the block.

    The result is the same but for rounding. A model without flash attention is left alone. The model is put back when
    the block ends, also by an exception; meanwhile it is changed for other threads, too.

    Args:
        model: a causal model of transformers.

    Raises:
        SteeringError: its decoder layers are not found.
    """
    stack, shape = find_decoder(model)
    modules = [module for layer in shape.layers for module in stack.get_submodule(layer.path).modules()]
    calling = [module for module in modules if callable(getattr(module, _CALL, None))]
    with ExitStack() as put_back:
        for module in calling:
            put_back.enter_context(_replaced(module, _CALL, partial(_attend, module)))
        if not calling:
            configs = [getattr(module, "config", None) for module in (stack, *modules)]
            for config in {id(each): each for each in configs}.values():
                if "flash" in str(getattr(config, _NAME, None)):
                    put_back.enter_context(_replaced(config, _NAME, "sdpa"))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own inside the block, past any setter that does more."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before


def _attend(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    query_length: int,
    dropout: float = 0.0,
    softmax_scale: float | None = None,
    use_sliding_windows: bool = False,
) -> Tensor:
    """Do what `_flash_attention_forward` of a layer of transformers does.

    Args:
        query: [rows, queries, heads, features].
        key, value: [rows, keys, key heads, features].
        attention_mask: [rows, keys], 0 for padding; None: there is no padding.

    Returns:
        [rows, queries, heads, features], 0 for padding.
    """
    causal = bool(getattr(layer, "is_causal", True)) and query_length > 1
    window = _window(layer) if use_sliding_windows else None
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if key.shape[1] != query.shape[1]:  # grouped queries: several heads share a key
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    attend: Callable[..., Tensor] = partial(
        functional.scaled_dot_product_attention, query, key, value, dropout_p=dropout, scale=softmax_scale
    )
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and window is None and (not causal or queries == keys):
        return attend(is_causal=causal).transpose(1, 2)
    # The last query is at the last key.
    distance = (torch.arange(queries) + keys - queries)[:, None] - torch.arange(keys)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance <= window
    seen = seen.to(query.device)[None, None]
    if attention_mask is None:
        return attend(attn_mask=seen).transpose(1, 2)
    present = attention_mask.bool()
    seen = seen & present[:, None, None]
    seen = seen | ~seen.any(-1, keepdim=True)  # a row of padding that sees nothing would become NaN
    return attend(attn_mask=seen).transpose(1, 2) * present[:, -queries:, None, None]


def _window(layer: nn.Module) -> int | None:
    """Return how many positions back a layer's queries see; None: all. Qwen2's upper layers have no window."""
    config: Any = layer.config
    upper = getattr(config, "max_window_layers", None)
    if upper is not None and int(getattr(layer, "layer_idx", 0)) >= upper:
        return None
    return int(config.sliding_window)
