"""Put the mode of a training on its model before the trainer is built: attached, and alone trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from rich.console import Console

from llava_steering_plugin.adapters.attachment import Attachment, attach
from llava_steering_plugin.adapters.counts import counted, parameter_table
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import load_adapter
from llava_steering_plugin.errors import ArgumentsError, listing
from llava_steering_plugin.training import provenance
from llava_steering_plugin.training.settings.conflicts import DATA_PARALLEL, NO_FSDP
from llava_steering_plugin.training.settings.flags import CANNOT_START, TrainingRequest, mode_from
from llava_steering_plugin.training.settings.remarks import warn_of_settings

# The training that this context runs: LLaVA's train() passes only a part of the flags on to its trainer.
REQUEST: ContextVar[TrainingRequest | None] = ContextVar("llava_steering_training_request", default=None)


def refuse_unsupported(arguments: Any) -> None:
    """Refuse what shows only when the arguments are complete.

    Raises:
        ArgumentsError: several GPUs in one process, or FSDP.
    """
    problems = []
    if arguments.n_gpu > 1:
        problems.append(DATA_PARALLEL.format(arguments.n_gpu))
    if arguments.fsdp:
        problems.append(NO_FSDP)
    if problems:
        raise ArgumentsError(listing(CANNOT_START, problems))


def attach_mode(model: Any, arguments: Any, tokenizer: Any) -> Attachment:
    """Attach the mode, freeze everything else but the projector, and print what is trained."""
    request = REQUEST.get()
    adapter = arguments.adapter_path if request is None or request.adapter is None else request.adapter
    # `train()` seeds only inside the trainer; the adapter's first values must not depend on what ran before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        if adapter:
            attachment = load_adapter(model, adapter, tokenizer, as_trained=False)
        else:
            attachment = attach(model, (request and request.mode) or mode_from(arguments))
    model.requires_grad_(False)
    for parameter in attachment.trained().values():
        parameter.requires_grad_(True)
    projector = image_parameters(model)
    trained = {} if arguments.freeze_mm_mlp_adapter else projector
    for parameter in trained.values():
        parameter.requires_grad_(True)
        if arguments.fp16 and parameter.dtype == torch.float16:
            # GradScaler refuses gradients in half precision; with --bits LLaVA leaves the projector in it.
            parameter.data = parameter.data.float()
    provenance.record(attachment, arguments, None if request is None else request.flags, tokenizer, trained.keys())
    if arguments.process_index == 0:
        warn_of_settings(attachment)
        # Counted in the model itself, so that packed and sharded weights count with their real size.
        other = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trained.values())
        Console().print(
            parameter_table(attachment.mode.full_name, counted(model, attachment.modules, attachment.shape, other))
        )
    return attachment


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
