"""Run a model over a question with its answer, and know what every position of the pass holds."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.token_map import IGNORED, spliced
from llava_steering_plugin.inference.forced import ForcedAnswer
from llava_steering_plugin.measures.modality import PADDING, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ForcedPass:
    """One pass over a prompt with its answer.

    Attributes:
        kinds: int64 [1, positions], a `Kind` each.
        forward: runs the pass.
    """

    kinds: Tensor
    forward: Callable[[], Any]


def forced_pass(
    model: PreTrainedModel, forced: ForcedAnswer, images: Mapping[str, Any], adapter: str | None = None
) -> ForcedPass:
    """Prepare the pass of a LLaVA over one prompt with its answer.

    The answer's tokens are labels, as in training, so that an adapter takes what is before them for the prompt.

    Args:
        images: the arguments of the model's `forward` that pass the pictures.
        adapter: whose name the pool on the model is to be asked by; None: the model carries no pool.

    Raises:
        ArgumentsError: the model cuts the sequence, or it holds no answer.
    """
    ids = torch.tensor([forced.ids], device=model.device)
    labels = ids.clone()
    labels[:, : forced.answer] = IGNORED
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images}
    named = {} if adapter is None else {"adapter_names": [adapter]}
    kinds = _kinds_of_positions(model, forced, given)

    def forward() -> Any:
        with torch.inference_mode():
            return model(**given, **named, use_cache=False)

    return ForcedPass(kinds, forward)


def _kinds_of_positions(model: Any, forced: ForcedAnswer, given: Mapping[str, Any]) -> Tensor:
    """Return what the positions hold once LLaVA has spliced the images in, int64 [1, positions]."""
    # The class's own method: an adapter or a pool on the model has shadowed the model's, and is not asked here.
    splice = types.MethodType(type(model).prepare_inputs_labels_for_multimodal, model)
    with torch.inference_mode():
        _, tokens = spliced(
            splice,
            input_ids=given["input_ids"],
            position_ids=None,
            attention_mask=given["attention_mask"],
            past_key_values=None,
            labels=None,
            images=given.get("images"),
            image_sizes=given.get("image_sizes"),
        )
    if tokens is None:
        raise ArgumentsError("the prompt is empty.")
    visual = tokens.visual.cpu()
    text = tokens.attention.cpu() & ~visual
    kinds = torch.full(visual.shape, PADDING)
    kinds[visual] = int(Kind.IMAGE)
    of_text = _kinds_of_text(forced)
    if int(text.sum()) != len(of_text):
        raise ArgumentsError(
            f"with its answer it has {len(of_text) + int(visual.sum())} tokens or more, and the model reads "
            f"{int(tokens.attention.sum())}."
        )
    if Kind.ANSWER not in of_text:
        raise ArgumentsError("its answer is empty.")
    kinds[text] = torch.tensor([int(kind) for kind in of_text])
    return kinds


def _kinds_of_text(forced: ForcedAnswer) -> list[Kind]:
    """Return the kind of every id but the placeholders of images, which are negative."""
    kinds = []
    for number, token in enumerate(forced.ids):
        if token < 0:
            continue
        if number >= forced.answer:
            kinds.append(Kind.ANSWER)
        elif number == 0 and forced.first:
            kinds.append(Kind.FIRST)
        else:
            kinds.append(Kind.SYSTEM if number in forced.system else Kind.PROMPT)
    return kinds
