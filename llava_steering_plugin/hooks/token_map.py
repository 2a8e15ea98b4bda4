"""Find out which tokens are visual from LLaVA's own splice, whatever its layout.

LLaVA puts image features between text embeddings in `prepare_inputs_labels_for_multimodal`, in layouts that differ
(square, anyres, several images, truncation, padding on either side, forks). It moves the labels along, so labels that
are the positions 0, 1, 2, ... come back telling where every text token went; a position without a label that is no
padding holds an image feature. A gather then moves the real labels to their new positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llava_steering_plugin.errors import TokenMapError, UpstreamError

IGNORED = -100
Splice = Callable[..., tuple[Any, ...]]
# Signatures of functions, for as long as the functions exist.
_signatures: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()


def spliced(splice: Splice, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], TokenMap | None]:
    """Call LLaVA's splice with these arguments; return its result and the token map that follows from it.

    The map is None in a decode step, which has nothing to splice.

    Args:
        splice: the model's `prepare_inputs_labels_for_multimodal`.

    Raises:
        UpstreamError: the splice lacks arguments, or returns another number of values, than all known versions have.
        TokenMapError: it has left out rows.
    """
    if missing := {"input_ids", "attention_mask", "past_key_values", "labels"} - signature_of(splice).parameters.keys():
        raise UpstreamError(
            f"prepare_inputs_labels_for_multimodal of this LLaVA takes no {', '.join(sorted(missing))}; "
            "`llava-steering doctor` shows which LLaVA is in use."
        )
    if nothing_to_splice(splice, args, kwargs):
        return splice(*args, **kwargs), None

    call = signature_of(splice).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    ids, attention, labels = given["input_ids"], given["attention_mask"], given["labels"]
    given["attention_mask"] = attended = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention
    given["labels"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
    result = splice(*call.args, **call.kwargs)
    if len(result) != 6:
        raise UpstreamError(
            f"prepare_inputs_labels_for_multimodal of this LLaVA returns {len(result)} values where 6 are known; "
            "`llava-steering doctor` shows which LLaVA is in use."
        )
    new_ids, positions, new_attention, cache, embeds, places = result
    if embeds is None:
        return (new_ids, positions, attention, cache, None, labels), of_unspliced(attended, labels)

    if places.shape[0] != ids.shape[0]:
        raise TokenMapError(
            f"LLaVA's splice kept {places.shape[0]} of {ids.shape[0]} rows. LLaVA-NeXT keeps as many as `modalities` "
            f"has entries: pass modalities=['image'] * {ids.shape[0]}, or 'video' for rows with one."
        )
    present = new_attention.bool()
    moved = None
    if labels is not None:
        moved = labels.gather(1, places.clamp(min=0)).masked_fill(places < 0, IGNORED)
    tokens = TokenMap((places < 0) & present, present, _prompt(present, moved))
    return (new_ids, positions, None if attention is None else new_attention, cache, embeds, moved), tokens


def nothing_to_splice(splice: Splice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether the call is a decode step or brings embeddings. Cheap, because it runs for every token."""
    given = {**dict(zip(signature_of(splice).parameters, args, strict=False)), **kwargs}
    ids = given.get("input_ids")
    return ids is None or (ids.shape[1] == 1 and given.get("past_key_values") is not None)


def signature_of(splice: Splice) -> inspect.Signature:
    """Return the signature of a function or method, inspected once for each function."""
    function = getattr(splice, "__func__", splice)
    if function not in _signatures:
        _signatures[function] = inspect.signature(splice)
    return _signatures[function]


def of_unspliced(attention: Tensor, labels: Tensor | None) -> TokenMap:
    """Return the map of a text-only batch, which the splice has left unchanged.

    Args:
        attention: bool or 0/1 [rows, positions], 1 where there is no padding.
        labels: int64 [rows, positions], `IGNORED` where nothing is supervised; None at inference.
    """
    present = attention.bool()
    return TokenMap(torch.zeros_like(present), present, _prompt(present, labels))


def of_images(visual: Tensor, attention: Tensor, labels: Tensor | None) -> TokenMap:
    """Return the map of a batch whose visual positions are known.

    Args:
        visual: bool [rows, positions]; padding among them does not count.
        attention: bool [rows, positions], False where there is padding.
        labels: int64 [rows, positions], `IGNORED` where nothing is supervised; None at inference.
    """
    return TokenMap(visual & attention, attention, _prompt(attention, labels))


def _prompt(present: Tensor, labels: Tensor | None) -> Tensor:
    """Return the positions before the first supervised one of each row; all of a row without any."""
    if labels is None:
        return present
    return present & ((labels != IGNORED).cumsum(1) == 0)


@dataclass(frozen=True)
class TokenMap:
    """The kinds of the positions of a spliced batch; all masks are bool [rows, positions].

    Attributes:
        visual: positions that hold an image feature.
        attention: positions that are not padding.
        prompt: positions before the first supervised token; every position that is not padding where none is.
    """

    visual: Tensor
    attention: Tensor
    prompt: Tensor

    @classmethod
    def of_text(cls, attention: Tensor) -> TokenMap:
        """Return the map of a batch without images, from its attention mask, bool or 0/1 [rows, positions]."""
        attention = attention.bool()
        return cls(torch.zeros_like(attention), attention, attention)

    def expanded(self, rows: int) -> TokenMap:
        """Return the map for `rows` rows: `generate` repeats every row for beams or return sequences.

        Raises:
            TokenMapError: `rows` is no multiple of the map's rows.
        """
        times, rest = divmod(rows, self.visual.shape[0])
        if rest:
            raise TokenMapError(
                f"the token map has {self.visual.shape[0]} rows and the hidden states {rows}, which is no multiple "
                "of it. Give token_map() one row for each row of the batch."
            )
        if times == 1:
            return self
        return TokenMap(*(part.repeat_interleave(times, 0) for part in (self.visual, self.attention, self.prompt)))
