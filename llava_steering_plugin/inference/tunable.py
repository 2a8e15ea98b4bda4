"""Loads adapters and LoRAs so that gradients of their parameters can be computed, as in the training they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_steering_plugin.adapters.attachment import attachment_of
from llava_steering_plugin.adapters.stored.folder import PEFT_CONFIG
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.convert.torch_files import tensors_in
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.base_model import load_with_upstream, loading_name, read_base_config
from llava_steering_plugin.inference.models import base_of_lora

OTHER_WEIGHTS = "non_lora_trainables.bin"  # what upstream saves beside a LoRA: the projector


@dataclass(frozen=True)
class TunableModel:
    """A model with the parameters of one adapter, which alone require gradients. It is in eval mode: no dropout.

    Attributes:
        parameters: of the adapter, by name; of the projector, where that alone was trained.
        kind: "lora" (LLaVA's own, unmerged), or the full name of the tuning mode.
        base: where the base was loaded from.
        conversation: the template that it was trained with; None if unknown.
    """

    model: Any
    tokenizer: Any
    processor: Any
    parameters: Mapping[str, nn.Parameter]
    kind: str
    base: str
    conversation: str | None


def open_tunable(path: str, base: str | None, how: Mapping[str, Any]) -> TunableModel:
    """Load an adapter of ours, or an unmerged LoRA of LLaVA's own training, with its base.

    On a CPU the model computes in float32: in half precision many gradients are 0 there.

    Args:
        path: folder or hub id.
        base: where the base is, if not where the adapter's config says.
        how: `device`, `load_4bit`, `load_8bit`.

    Raises:
        ArgumentsError: `path` is neither.
        SteeringError: it cannot be loaded.
    """
    own = find(path)
    if own is not None:
        stored = own.read()
        tokenizer, model, processor = load_with_upstream(stored, base, "llava", how)
        attachment = attachment_of(model)
        assert attachment is not None
        parameters, kind = attachment.parameters(), attachment.mode.full_name
        if attachment.mode.projector_alone:
            parameters = {name: model.get_parameter(name) for name in sorted(attachment.extras)}
        where, conversation = base or stored.config.base.name_or_path, stored.config.conversation
    else:
        peft = Path(path).expanduser() / PEFT_CONFIG
        if not peft.is_file():
            raise ArgumentsError(f"{path} is neither an adapter nor an unmerged LoRA, so there is nothing to measure.")
        where, kind, conversation = base or base_of_lora(peft), "lora", None
        name = loading_name(where, read_base_config(where))
        tokenizer, model, processor = load_with_upstream(where, None, name, how)
        parameters = _put_lora_on(model, peft.parent)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _compute_precisely(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return TunableModel(model.eval(), tokenizer, processor, parameters, kind, where, conversation)


def _put_lora_on(model: Any, folder: Path) -> dict[str, nn.Parameter]:
    """Put a LoRA, and what was trained beside it, on its base; return the LoRA's parameters."""
    from peft import PeftModel

    others = folder / OTHER_WEIGHTS
    if others.is_file():
        prefixes = ("base_model.", "model.")  # PEFT's wrapper, and the model in it
        tensors = {}
        for name, tensor in tensors_in(others).items():
            if name.startswith(prefixes[0]):
                name = name.removeprefix(prefixes[0]).removeprefix(prefixes[1])
            tensors[name] = tensor
        model.load_state_dict(tensors, strict=False)
    before = {id(parameter) for parameter in model.parameters()}
    tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    return {name: parameter for name, parameter in tuned.named_parameters() if id(parameter) not in before}


def _compute_precisely(model: Any) -> None:
    if model.device == torch.device("cpu") and not getattr(model, "is_quantized", False):
        model.float()
