"""Which tokens are visual: learned from LLaVA's own splice, whatever its layout.

LLaVA puts image features between text embeddings in `prepare_inputs_labels_for_multimodal`, in layouts that differ
(square, anyres, several images, truncation, padding on either side, forks). It moves the labels along, so labels that
are the positions 0, 1, 2, ... come back telling where every text token went; what has no label and is no padding is
an image feature. The real labels follow by a gather.
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
# By function, for as long as there is one.
_signatures: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()


def spliced(splice: Splice, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], TokenMap | None]:
    """Calls LLaVA's splice with these arguments; returns what it returns, and the token map it implies.

    The map is None where the call is a decode step: there is nothing to splice then.

    Raises:
        UpstreamError: the splice has other arguments or results than any LLaVA known.
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

    present = new_attention.bool()
    moved = None
    if labels is not None:
        moved = labels.gather(1, places.clamp(min=0)).masked_fill(places < 0, IGNORED)
    tokens = TokenMap((places < 0) & present, present, _prompt(present, moved))
    return (new_ids, positions, None if attention is None else new_attention, cache, embeds, moved), tokens


def nothing_to_splice(splice: Splice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call is a decode step, or brings embeddings: asked for every token, so without binding arguments."""
    given = {**dict(zip(signature_of(splice).parameters, args, strict=False)), **kwargs}
    ids = given.get("input_ids")
    return ids is None or (ids.shape[1] == 1 and given.get("past_key_values") is not None)


def signature_of(splice: Splice) -> inspect.Signature:
    """The signature, looked up once for each function: of methods only what all instances share is kept."""
    function = getattr(splice, "__func__", splice)
    if function not in _signatures:
        _signatures[function] = inspect.signature(splice)
    return _signatures[function]


def of_unspliced(attention: Tensor, labels: Tensor | None) -> TokenMap:
    """The map of a text-only batch that went past the splice unchanged."""
    present = attention.bool()
    return TokenMap(torch.zeros_like(present), present, _prompt(present, labels))


def _prompt(present: Tensor, labels: Tensor | None) -> Tensor:
    """The positions before the first supervised one of each row; all where no label is supervised."""
    if labels is None:
        return present
    return present & ((labels != IGNORED).cumsum(1) == 0)


@dataclass(frozen=True)
class TokenMap:
    """Which positions of a spliced sequence are what. All bool [rows, positions].

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
        """The map of a batch without images."""
        attention = attention.bool()
        return cls(torch.zeros_like(attention), attention, attention)

    def expanded(self, rows: int) -> TokenMap:
        """The map after `generate` repeated every row for beams or return sequences."""
        times, rest = divmod(rows, self.visual.shape[0])
        if rest:
            raise TokenMapError(
                f"the token map has {self.visual.shape[0]} rows and the hidden states {rows}, which is no multiple "
                "of it. Give token_map() one row for each row of the batch."
            )
        if times == 1:
            return self
        return TokenMap(*(part.repeat_interleave(times, 0) for part in (self.visual, self.attention, self.prompt)))
