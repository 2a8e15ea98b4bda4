"""Describes every pass through the decoder stack before its first layer runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.checkpointing import (
    _change_checkpointing,
    _checkpointing_parts,
    bound_to_scope,
    unbound,
)
from llava_steering_plugin.hooks.scope import Scope, current
from llava_steering_plugin.hooks.token_map import TokenMap
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass


def watch(
    stack: nn.Module,
    shape: DecoderShape,
    owner: object,
    takes_images: bool,
    begin: Callable[[Scope, ForwardPass], None],
) -> RemovableHandle:
    """Has every pass through the decoder stack described before its first layer runs.

    Args:
        stack, shape: as `find_decoder` gives them.
        owner: whose modules work in the stack.
        takes_images: the model splices images itself, so that a generation without a map is one without images.
        begin: is told of every pass that `owner` has not been kept out of.
    """
    names = list(inspect.signature(stack.forward).parameters)
    parts = _checkpointing_parts(stack, shape)

    def describe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # transformers sets the function in `train()` and may replace it, so it is looked at in every pass that may be
        # recomputed. In the others, decode steps above all, it would cost as much as all that follows.
        if torch.is_grad_enabled():
            _change_checkpointing(parts, bound_to_scope)
        scope = current()
        if scope is None:
            raise TokenMapError(
                f"{type(stack).__name__} was called on its own, so nobody knows which positions are visual. Call the "
                "whole model, or wrap the call in `with token_map(visual=mask):`."
            )
        scope.step, scope.groups = None, ()
        if id(owner) not in scope.disabled:
            begin(scope, _pass(scope, {**dict(zip(names, args, strict=False)), **kwargs}, takes_images))

    return stack.register_forward_pre_hook(describe, with_kwargs=True)


def unwatch(stack: nn.Module, shape: DecoderShape, handle: RemovableHandle) -> None:
    """Undoes `watch`."""
    handle.remove()
    _change_checkpointing(_checkpointing_parts(stack, shape), unbound)


def _pass(scope: Scope, given: dict[str, Any], takes_images: bool) -> ForwardPass:
    hidden = given.get("inputs_embeds")
    if hidden is None:
        hidden = given["input_ids"]
    rows, positions = hidden.shape[:2]
    cached = _cached(given.get("past_key_values"))
    if cached and positions == 1:
        step = torch.zeros(rows, 1, dtype=torch.bool, device=hidden.device)
        return ForwardPass(step, ~step, step, True, scope.kept)
    if cached:
        raise TokenMapError(
            f"{positions} positions at once over a cache of {cached}: neither a prefill nor a decode step, so the "
            "adapter cannot tell which of them are visual. Assisted decoding and chunked prefills are not supported."
        )
    if scope.tokens is None and scope.generating and takes_images:
        attention = given.get("attention_mask")
        if attention is None or attention.shape != (rows, positions):
            attention = hidden.new_ones(rows, positions, dtype=torch.bool)
        scope.tokens = TokenMap.of_text(attention)
    if scope.tokens is None:
        raise TokenMapError(
            "the model was called with inputs_embeds (or is no LLaVA), and nobody said which positions are visual. "
            "Pass input_ids and images, or wrap the call in `with token_map(visual=mask, attention=mask):`."
        )
    tokens = scope.tokens.expanded(rows) if scope.generating else scope.tokens
    if tokens.visual.shape != (rows, positions):
        raise TokenMapError(
            f"the token map describes {list(tokens.visual.shape)} [rows, positions] and the hidden states are "
            f"{[rows, positions]}. A map holds for the one batch it was made for."
        )
    return ForwardPass(tokens.visual, tokens.attention & ~tokens.visual, tokens.prompt, False, scope.kept)


def _cached(cache: Any) -> int:
    """Positions in a key-value cache, in whatever form transformers keeps it."""
    if cache is None or (isinstance(cache, (tuple, list)) and not cache):
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    first = cache[0][0]
    return int(first.shape[-2]) if isinstance(first, Tensor) else 0
