"""Moves padding to the left before a generation: new tokens have to follow the prompt of a row, not its padding.

LLaVA pads rows that its images have made unequal on the right, unless the model's config says otherwise, and leaves out
the attention mask if it was given none. The shorter rows of a batch then answer otherwise than alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.token_map import TokenMap

# Arguments of `generate` and results of the splice that have a value for each position.
PER_POSITION = ("attention_mask", "position_ids")


def on_the_left(
    model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], *, spliced: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `generate` with the padding of every row on its left.

    Args:
        spliced: the model is a LLaVA, whose output is new tokens alone. Others repeat the prompt, so nothing is moved.

    Raises:
        ArgumentsError: rows of a model that is no LLaVA are padded on the right; or some rows begin or end with the
            padding token, and there is no attention mask.
    """
    named = next((name for name in ("inputs", "input_ids") if isinstance(keywords.get(name), Tensor)), None)
    ids = arguments[0] if arguments else keywords.get(named or "")
    attention = keywords.get("attention_mask")
    if isinstance(ids, Tensor) and ids.dim() == 2 and attention is None:
        padded = _padding(model, ids, keywords)
        if spliced:
            _refuse_unmasked(padded)
        else:  # transformers takes them for padding
            attention = ~padded
    if not isinstance(attention, Tensor) or attention.dim() != 2 or (order := _order(attention.bool())) is None:
        return arguments, keywords
    if not spliced:
        rows = (attention.bool()[:, :-1] & ~attention.bool()[:, 1:]).any(1)
        raise ArgumentsError(
            f"{_rows(rows)} of the batch are padded on the right, so what is generated would follow their padding. "
            'Pad on the left: tokenizer.padding_side = "left".'
        )
    if not isinstance(ids, Tensor) or ids.shape != attention.shape:
        return arguments, keywords
    moved = {name: _moved(keywords[name], order) for name in PER_POSITION if isinstance(keywords.get(name), Tensor)}
    if arguments:
        return (_moved(ids, order), *arguments[1:]), keywords | moved
    return arguments, keywords | moved | {str(named): _moved(ids, order)}


def left_spliced(result: tuple[Any, ...], tokens: TokenMap) -> tuple[tuple[Any, ...], TokenMap]:
    """Return what LLaVA's splice has made of a batch, with the padding on the left, and its token map."""
    ids, positions, attention, cache, embeds, labels = result
    if embeds is None or bool(tokens.attention.all()):
        return result, tokens
    order = _order(tokens.attention)
    if order is not None:
        tokens = TokenMap(*(part.gather(1, order) for part in (tokens.visual, tokens.attention, tokens.prompt)))
        positions, attention, embeds, labels = (
            _moved(part, order) if isinstance(part, Tensor) else part for part in (positions, attention, embeds, labels)
        )
    if attention is None:  # LLaVA was given none, and leaves out that there is padding now
        attention = tokens.attention.long()
    return (ids, positions, attention, cache, embeds, labels), tokens


def _padding(model: Any, ids: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Return bool [rows, positions]: where the padding token is; nowhere if it is unknown, or also ends answers."""
    found = [keywords, vars(getattr(model, "generation_config", None) or model.config), vars(model.config)]
    pad, end = (
        next((given[name] for given in found if given.get(name) is not None), None)
        for name in ("pad_token_id", "eos_token_id")
    )
    if pad is None or pad == end or (isinstance(end, list) and pad in end):
        return torch.zeros_like(ids, dtype=torch.bool)
    return ids.eq(pad)


def _refuse_unmasked(padded: Tensor) -> None:
    """Refuse batches in which some rows begin or end with the padding token, which would be read as text.

    Raises:
        ArgumentsError: some do.
    """
    rows = padded[:, 0] | padded[:, -1]
    if len(padded) > 1 and bool(rows.any()):
        raise ArgumentsError(
            f"{_rows(rows)} of the batch begin or end with the padding token, and there is no attention_mask, so the "
            "padding would be read as text. Give attention_mask, with 0 where there is padding."
        )


def _rows(chosen: Tensor) -> str:
    """Return the numbers of the rows for which bool [rows] is True."""
    return f"row(s) {', '.join(map(str, chosen.nonzero().flatten().tolist()))}"


def _order(attention: Tensor) -> Tensor | None:
    """Return int64 [rows, positions]: the padding of each row, then the rest in its order; None if it is so already.

    Args:
        attention: bool [rows, positions], False for padding.
    """
    if bool((attention[:, 1:] >= attention[:, :-1]).all()):
        return None
    return torch.sort(attention.long(), dim=1, stable=True).indices


def _moved(part: Tensor, order: Tensor) -> Tensor:
    """Move what is at each position, in [rows, positions] or [rows, positions, features]."""
    if part.dim() == 3:
        return part.gather(1, order.unsqueeze(-1).expand(-1, -1, part.shape[-1]))
    return part.expand(order.shape).gather(1, order)
