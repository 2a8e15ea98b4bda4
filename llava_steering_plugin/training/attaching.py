"""Check an adapter on its model before the trainer is built, show what is trained, and undo what trainers change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.counts import parameter_table
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.training.settings.conflicts import DATA_PARALLEL, NO_FSDP
from llava_steering_plugin.training.settings.flags import CANNOT_START, TrainingRequest
from llava_steering_plugin.training.settings.remarks import warn_of_settings

# The training that this context runs: LLaVA's train() passes only a part of the flags on to its trainer.
REQUEST: ContextVar[TrainingRequest | None] = ContextVar("llava_steering_training_request", default=None)
_NAMED = 5
# `accelerate launch` sets it where its config or its options ask for FSDP; a trainer's arguments do not show that.
_FSDP_ASKED = "ACCELERATE_USE_FSDP"
_YES = ("1", "true", "yes", "y", "t", "on")


def refuse_unsupported(arguments: Any) -> None:
    """Refuse what shows only when the arguments are complete.

    Raises:
        ArgumentsError: several GPUs in one process, or FSDP, which the arguments or accelerate's config ask for. On the
            CPU accelerate would leave the latter out in silence; it is refused there, too.
    """
    problems = []
    if arguments.n_gpu > 1:
        problems.append(DATA_PARALLEL.format(arguments.n_gpu))
    if arguments.fsdp:
        problems.append(NO_FSDP)
    elif os.environ.get(_FSDP_ASKED, "").lower() in _YES:
        problems.append(f"accelerate's config asks for FSDP ({_FSDP_ASKED}). {NO_FSDP}")
    if problems:
        raise ArgumentsError(listing(CANNOT_START, problems))


def refuse_unsaved(attachment: Attachment) -> None:
    """Refuse to train parameters of the base that would not be saved; those that an adapter can hold belong to it now.

    Raises:
        SteeringError: such parameters are trained; the message names some.
    """
    model: Any = attachment.model
    ours = {id(parameter) for parameter in attachment.parameters().values()}
    trained = {
        name for name, each in model.named_parameters() if each.requires_grad and id(each) not in ours
    } - attachment.extras
    attachment.extras |= (found := trained & image_parameters(model).keys())
    if unsaved := sorted(trained - found):
        named = ", ".join(unsaved[:_NAMED]) + ", ..." * (len(unsaved) > _NAMED)
        raise SteeringError(
            f"{len(unsaved)} parameters of the base would be trained, and no adapter can hold them: {named}. "
            "get_model(model, mode) trains the adapter alone; so does model.requires_grad_(False) before attach()."
        )


def introduce(attachment: Attachment) -> None:
    """Warn of unusual settings, and print what is trained; on one rank."""
    warn_of_settings(attachment)
    # Counted in the model itself, so that packed and sharded weights count with their real size.
    Console().print(parameter_table(attachment.mode.full_name, attachment.summary()))


@contextmanager
def marked_as_peft(model: Any) -> Iterator[None]:
    """Mark a quantised model as PEFT's inside the block: the trainer's constructor refuses other quantised models.

    Outside the constructor, the mark would change what `save_pretrained` writes.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


@contextmanager
def changes_undone(attachment: Attachment) -> Iterator[None]:
    """Give trained parameters their values and precision back at the end, and refuse a vocabulary that has changed.

    TRL rounds all that is trained on a quantised model to bfloat16, and resizes the embeddings for tokens of another
    chat template.

    Raises:
        SteeringError: the embeddings have been resized.
    """
    model: Any = attachment.model
    kept = [(each, each.data) for each in model.parameters() if each.requires_grad]
    rows = model.get_input_embeddings().weight.shape[0]
    yield
    for parameter, values in kept:
        if parameter.dtype != values.dtype:
            parameter.data = values.to(parameter.device)
    if (now := model.get_input_embeddings().weight.shape[0]) != rows:
        raise SteeringError(
            f"the trainer has resized the embeddings from {rows} to {now} tokens, and no adapter of this base could "
            "hold the new ones. Leave out what adds tokens (such as chat_template_path), or add them to the base, save "
            "it, and train on that."
        )
