"""Put the mode of one of LLaVA's trainings on its model before the trainer is built: attached, and alone trained."""

from __future__ import annotations

from typing import Any

import torch

from llava_steering_plugin.adapters.attachment import Attachment, attach
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import load_adapter
from llava_steering_plugin.training import provenance
from llava_steering_plugin.training.attaching import REQUEST, introduce
from llava_steering_plugin.training.settings.flags import mode_from


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
        introduce(attachment)
    return attachment
