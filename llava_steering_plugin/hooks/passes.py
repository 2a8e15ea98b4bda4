"""Describe a pass through the decoder stack from the arguments of its call and the scope that it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.scope import Scope
from llava_steering_plugin.hooks.token_map import TokenMap
from llava_steering_plugin.modes.base import ForwardPass


@dataclass(frozen=True)
class StackCall:
    """The arguments of one call of the decoder stack that decide what kind of pass it is.

    Attributes:
        hidden: [rows, positions, features] embeddings or, where there are none, [rows, positions] token ids.
        attention: the attention mask, in whatever form the caller gave it; None if it gave none.
        cached: number of positions in the key-value cache.
    """

    hidden: Tensor
    attention: Tensor | None
    cached: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> StackCall:
        """Read the call from its arguments, by the names that transformers' decoders give them."""
        hidden, cache = arguments.get("inputs_embeds"), arguments.get("past_key_values")
        return cls(
            arguments["input_ids"] if hidden is None else hidden,
            arguments.get("attention_mask"),
            _cached(arguments.get("cache") if cache is None else cache),  # "cache" since transformers 5.24
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and positions."""
        rows, positions = self.hidden.shape[:2]
        return rows, positions

    def as_text(self) -> TokenMap:
        """Return the token map of the call as one without images; a mask of another shape counts as no padding."""
        attention = self.attention
        if attention is None or attention.shape != self.shape:
            attention = self.hidden.new_ones(self.shape, dtype=torch.bool)
        return TokenMap.of_text(attention)


def describe_pass(scope: Scope, call: StackCall) -> ForwardPass:
    """Return the description of the pass that `call` begins, for the modules in the stack. Changes nothing.

    Raises:
        TokenMapError: the call is no decode step, and the scope has no token map or one of another shape; or several
            positions follow a cache.
    """
    rows, positions = call.shape
    if call.cached and positions == 1:
        image = torch.zeros(rows, 1, dtype=torch.bool, device=call.hidden.device)
        return ForwardPass(image, ~image, image, True, scope.kept, loss_gradient=scope.loss_gradient)
    if call.cached:
        raise TokenMapError(
            f"{positions} positions at once over a cache of {call.cached}: neither a prefill nor a decode step, so the "
            "adapter cannot tell which of them are visual. Assisted decoding and chunked prefills are not supported."
        )
    if scope.tokens is None:
        raise TokenMapError(
            "the model was called with inputs_embeds (or is no LLaVA), and it is unknown which positions are visual. "
            "Pass input_ids and images, or wrap the call in `with token_map(visual=mask, attention=mask):`."
        )
    tokens = scope.tokens.expanded(rows) if scope.generating else scope.tokens
    if tokens.visual.shape != call.shape:
        raise TokenMapError(
            f"the token map describes {list(tokens.visual.shape)} [rows, positions] and the hidden states are "
            f"{list(call.shape)}. A map holds for the one batch it was made for."
        )
    text = tokens.attention & ~tokens.visual
    return ForwardPass(tokens.visual, text, tokens.prompt, False, scope.kept, loss_gradient=scope.loss_gradient)


def _cached(cache: Any) -> int:
    """Return the number of positions in a key-value cache, in whatever form transformers keeps it."""
    if cache is None or (isinstance(cache, (tuple, list)) and not cache):
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    first = cache[0][0]
    return int(first.shape[-2]) if isinstance(first, Tensor) else 0
