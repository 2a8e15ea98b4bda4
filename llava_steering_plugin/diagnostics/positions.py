"""Run a model over a question with its answer, and know what every position of the pass holds."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.hooks.token_map import IGNORED, spliced
from llava_steering_plugin.inference.asking.forced import ForcedAnswer
from llava_steering_plugin.measures.modality import PADDING, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOO_LONG = "longer than the model's context"


class NotMeasured(ArgumentsError):
    """A question cannot be measured and is left out.

    Attributes:
        reason: the same for all such questions; the message says more.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ForcedPass:
    """One pass over a prompt with its answer.

    Attributes:
        kinds: int64 [1, positions], a `Kind` each.
        forward: runs the pass.
        given: the arguments of the model's `forward` but for the pictures and the adapter's name.
    """

    kinds: Tensor
    forward: Callable[[], Any]
    given: Mapping[str, Tensor]


def forced_pass(
    model: PreTrainedModel, forced: ForcedAnswer, images: Mapping[str, Any], adapter: str | None = None
) -> ForcedPass:
    """Prepare the pass of a LLaVA over one prompt with its answer.

    The answer's tokens are labels, as in training, so that an adapter takes what is before them for the prompt.

    Args:
        images: the arguments of the model's `forward` that pass the pictures.
        adapter: whose name the pool on the model is to be asked by; None: the model carries no pool.

    Raises:
        NotMeasured: the model cuts the sequence, or it holds no answer.
    """
    ids = torch.tensor([forced.ids], device=model.device)
    labels = ids.clone()
    labels[:, : forced.answer] = IGNORED
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    given = {**text, **images}
    named = {} if adapter is None else {"adapter_names": [adapter]}
    kinds = _kinds_of_positions(model, forced, given)

    def forward() -> Any:
        with torch.inference_mode():
            return model(**given, **named, use_cache=False)

    return ForcedPass(kinds, forward, text)


def prompt_kinds(prompts: Sequence[ForcedAnswer]) -> Tensor:
    """Return what the positions of the prompts hold that a model has begun to generate from, int64 [rows, positions].

    It is called inside the decoder, where the model's owner knows what LLaVA's splice has made of the batch.

    Args:
        prompts: without answers.

    Raises:
        SteeringError: the model carries neither adapter nor pool, or another batch is in it.
    """
    scope = current()
    tokens = None if scope is None else scope.tokens
    if tokens is None or len(tokens.visual) != len(prompts):
        raise SteeringError("the generation is not that of these prompts, one row each, on a model with a pool.")
    visual, attention = tokens.visual.cpu(), tokens.attention.cpu()
    kinds = torch.full(visual.shape, PADDING)
    kinds[visual] = int(Kind.IMAGE)
    # Masks are filled row by row, in the order of the text.
    kinds[attention & ~visual] = torch.tensor([int(kind) for prompt in prompts for kind in _kinds_of_text(prompt)])
    return kinds


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
            **{name: given[name] for name in ("image_sizes", "modalities") if name in given},
        )
    if tokens is None:
        raise NotMeasured("empty", "the prompt is empty.")
    visual = tokens.visual.cpu()
    text = tokens.attention.cpu() & ~visual
    kinds = torch.full(visual.shape, PADDING)
    kinds[visual] = int(Kind.IMAGE)
    of_text = _kinds_of_text(forced)
    if int(text.sum()) != len(of_text):
        raise NotMeasured(
            TOO_LONG,
            f"with its answer it has {len(of_text) + int(visual.sum())} tokens or more, and the model reads "
            f"{int(tokens.attention.sum())}.",
        )
    if Kind.ANSWER not in of_text:
        raise NotMeasured("no answer", "its answer is empty.")
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
