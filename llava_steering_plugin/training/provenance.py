"""Record where an adapter comes from: base, added tokens, conversation template, and trained weights of the base."""

from __future__ import annotations

import dataclasses
import logging
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.adapters.fit.compatibility import mode_of
from llava_steering_plugin.adapters.fit.fingerprint import check_base
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.components.chat_template import chat_template
from llava_steering_plugin.errors import ArgumentsError, BaseMismatch, CheckpointError, listing
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.joint import flags_of

logger = logging.getLogger(__name__)


def record(
    attachment: Attachment, arguments: Any, flags: Namespace | None, tokenizer: Any, trained: Iterable[str]
) -> None:
    """Record on the attachment everything that a later load has to know, and which parameters of the base to save.

    Args:
        attachment: gets `config` and `extras`.
        arguments: the training arguments.
        flags: all flags; None if the trainer was not started by LLaVA's train().
        tokenizer: as training uses it.
        trained: names of the base's parameters that are trained.
    """
    model: Any = attachment.model
    name = flags.model_name_or_path if flags is not None else model.config._name_or_path
    described = read_config(name)
    attachment.extras |= set(trained)
    brought = flags is None or getattr(flags, "pretrain_mm_mlp_adapter", None) is not None
    if brought or "mm_vision_tower" not in described:
        attachment.extras |= image_parameters(model).keys()
    base = BaseModel(
        name_or_path=name,
        model_type=described["model_type"],
        hidden_size=attachment.shape.hidden_size,
        num_layers=len(attachment.shape.layers),
        vocab_size=_known_tokens(name, tokenizer, int(described.get("vocab_size", model.config.vocab_size))),
    )
    attachment.config = AdapterConfig(
        attachment.mode.name,
        attachment.mode.settings(),
        base,
        conversation=_conversation(),
        chat_template=_chat_template(model.config),
        added_tokens=_added_tokens(name, tokenizer),
        trained_on=_precision(arguments, getattr(arguments, "bits", 16)),
    )


def record_precision(attachment: Attachment, arguments: Any) -> None:
    """Record in which precision an adapter is trained; the model itself says all else that a later load has to know."""
    attachment.config = dataclasses.replace(
        describe(attachment), trained_on=_precision(arguments, _bits(attachment.model))
    )


def refuse_another_training(attachment: Attachment, checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint with other settings, or of another base: its tensors might fit all the same.

    Raises:
        CheckpointError: the checkpoint is of another training; the message lists every difference.
        AdapterError: the checkpoint's adapter is damaged.
    """
    stored = AdapterFolder(checkpoint).read()
    here, there = (_as_flags(each) for each in (attachment.mode, mode_of(stored.config)))
    problems = [
        f"--{name} is {here.get(name)} and was {there.get(name)}"
        for name in (*there, *(here.keys() - there.keys()))
        if here.get(name) != there.get(name)
    ]
    try:
        check_base(attachment.model, stored)
    except BaseMismatch:
        problems.append(f"--model_name_or_path is another base than {stored.config.base.name_or_path}")
    if problems:
        raise CheckpointError(
            listing(
                f"{checkpoint} is of another training, and this one would resume from it. Repeat its flags, or give "
                "another --output_dir to start a new training",
                problems,
            )
        )


def _as_flags(mode: Mode) -> dict[str, Any]:
    return {"tuning_mode": mode.name, **flags_of(mode)}


def _conversation() -> str | None:
    """Return the name of the template that training writes its prompts with."""
    # Looked up where LLaVA keeps it: this room imports nothing of llava.
    module = sys.modules.get("llava.conversation")
    if module is None:
        return None
    return next(
        (key for key, template in module.conv_templates.items() if template is module.default_conversation), None
    )


def _chat_template(config: Any) -> str | None:
    """Return the chat template that writes the same prompts; None if these are no chat.

    Args:
        config: of the model, which says how an image is marked.
    """
    module, constants = (sys.modules.get(f"llava.{name}") for name in ("conversation", "constants"))
    if module is None or constants is None or _conversation() is None:
        return None
    image = str(constants.DEFAULT_IMAGE_TOKEN)
    if getattr(config, "mm_use_im_start_end", False):
        image = f"{constants.DEFAULT_IM_START_TOKEN}{image}{constants.DEFAULT_IM_END_TOKEN}"
    try:
        return chat_template(module.default_conversation, image)
    except (ArgumentsError, AttributeError, TypeError) as error:  # forks have other kinds of templates
        logger.warning(
            "conversation template %s: the adapter brings no chat template for transformers: %s", _conversation(), error
        )
    return None


def _known_tokens(base: str, tokenizer: Any, rows: int) -> int:
    """Return how many rows of the base's embedding have a token: loaders of LLaVA may cut the others off.

    Args:
        rows: of the embedding, which may be padded, as Qwen's are.
    """
    return rows if tokenizer is None else min(rows, max(_vocabulary(base, tokenizer).values()) + 1)


def _vocabulary(base: str, tokenizer: Any) -> dict[str, int]:
    """Return the tokens of the base's own tokenizer, of the same kind as training's."""
    from transformers import AutoTokenizer

    found: dict[str, int] = AutoTokenizer.from_pretrained(base, use_fast=tokenizer.is_fast).get_vocab()
    return found


def _added_tokens(base: str, tokenizer: Any) -> dict[str, int]:
    """Return the tokens that training's tokenizer has and the base's has not, by ascending id."""
    if tokenizer is None:
        return {}
    known = _vocabulary(base, tokenizer)
    added = {token: number for token, number in tokenizer.get_added_vocab().items() if token not in known}
    return dict(sorted(added.items(), key=lambda item: item[1]))


def _precision(arguments: Any, bits: int) -> dict[str, Any]:
    compute = "float16" if arguments.fp16 else "bfloat16" if arguments.bf16 else "float32"
    trained: dict[str, Any] = {"bits": bits, "compute dtype": compute}
    if bits == 4 and hasattr(arguments, "quant_type"):
        trained["quantisation"] = f"{arguments.quant_type}{', double' if arguments.double_quant else ''}"
    return trained


def _bits(model: Any) -> int:
    """Return how many bits the weights of the base have: bitsandbytes' marks on a model, or those of its dtype."""
    if getattr(model, "is_loaded_in_4bit", False):
        return 4
    return 8 if getattr(model, "is_loaded_in_8bit", False) else 8 * int(model.dtype.itemsize)
