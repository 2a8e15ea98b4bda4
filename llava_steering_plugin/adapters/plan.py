"""What a tuning mode would train on a model, from its config.json alone: built on the meta device, and counted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_steering_plugin.adapters.attach import attach
from llava_steering_plugin.adapters.summary import LORA_RANKS, ParameterCounts, counted
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.layers import find_decoder
from llava_steering_plugin.modes.base import Mode

if TYPE_CHECKING:
    from llava_steering_plugin.adapters.fit import MemoryPlan

VISION_PREFIX = "llava"
PARAMETERS = ("mode", "projector", "trainable", "model", "percent", *(f"lora_r{rank}" for rank in LORA_RANKS))


@dataclass(frozen=True)
class Plan:
    """What a command line would train.

    Attributes:
        mode, settings: the tuning mode; None if the command line names none that is known.
        counts: None if the model or the mode cannot be built.
        memory: None if it was not asked for, or something that it needs is not known.
        notes: what the plan does not know or has not checked.
        problems: why this training would not start.
    """

    mode: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: ParameterCounts | None = None
    memory: MemoryPlan | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Every key is always there; what is unknown is None."""
        parameters: dict[str, float | None] = dict.fromkeys(PARAMETERS)
        if self.counts is not None:
            counts = self.counts
            known = (counts.mode, counts.other, counts.trainable, counts.model, counts.percent)
            parameters = dict(zip(PARAMETERS, (*known, *counts.lora.values()), strict=True))
        return {
            "mode": self.mode,
            "settings": dict(self.settings),
            "parameters": parameters,
            "memory": None if self.memory is None else self.memory.as_json(),
            "notes": list(self.notes),
            "problems": list(self.problems),
        }


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a folder or of a model on the hub; no weights are looked for.

    Raises:
        SteeringError: none there, not JSON, or without a model_type.
    """
    from transformers import PretrainedConfig

    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise SteeringError(f"{name} has no config.json. Give the folder of a model, or a model's name on the hub.")
    try:
        described: dict[str, Any] = PretrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        if os.path.exists(name):
            raise SteeringError(f"the config of {name} cannot be read: {error}") from error
        raise SteeringError(
            f"there is no folder {name}, and no model of that name can be fetched from the hub. "
            "Give a folder with a config.json."
        ) from error
    except TypeError as error:  # what transformers makes of JSON that is no object
        raise SteeringError(f"the config.json of {name} holds no settings: it is not that of a model.") from error
    if not isinstance(described.get("model_type"), str):
        raise SteeringError(f"the config.json of {name} names no model_type, so it is not the config of a model.")
    return described


def language_model(described: Mapping[str, Any], name: str) -> nn.Module:
    """The language model that a config describes, without vision, on the meta device: shapes and no values.

    Args:
        described: config.json of a plain language model, of a LLaVA of upstream's (the language model's config with a
            prefix in its model_type) or of one of transformers' own (the language model under `text_config`).
        name: of the model, for errors.

    Raises:
        SteeringError: the model type is unknown here, or its config cannot be built.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    kind, text = _text_config(described)
    config_class = _config_class(kind)
    if config_class is None or config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SteeringError(
            f"{name} has model type {described['model_type']!r}; transformers and LLaVA as installed know no language "
            f"model {kind!r}. Install the LLaVA, or the version of transformers, that runs this model."
        )
    try:
        config = config_class.from_dict({key: value for key, value in text.items() if key != "model_type"})
        # Drawing values that the meta device does not keep takes seconds.
        with torch.device("meta"), no_init_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise SteeringError(f"the config.json of {name} describes no model that can be built: {error}") from error
    return model


def _text_config(described: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The language model's type and config."""
    nested = described.get("text_config")
    if isinstance(nested, dict):
        # transformers leaves out what equals a default, also the type: Llama's, for its LLaVA.
        return nested.get("model_type", "llama"), nested
    kind: str = described["model_type"]
    if kind.startswith(VISION_PREFIX):
        # LLaVA's first checkpoints say "llava" and no more.
        return kind.removeprefix(VISION_PREFIX).strip("_-") or "llama", described
    return kind, described


def _config_class(kind: str) -> Any:
    """The class of plain language-model configs of that type, or of what LLaVA calls llava_<type>; None if unknown."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    registered = f"{VISION_PREFIX}_{kind}"
    if registered not in CONFIG_MAPPING:
        return None
    # A LLaVA that has been imported registers its configs; each extends the one of its language model.
    parents = CONFIG_MAPPING[registered].__mro__[1:]
    return next((parent for parent in parents if issubclass(parent, PretrainedConfig) and parent.model_type), None)


def count(model: Any, mode: Mode, projector: int | None) -> ParameterCounts:
    """Counts what training `mode` on `model` would train, attaching it as training does.

    Args:
        model: on the meta device; carries the adapter afterwards.
        mode: valid in itself.
        projector: trained parameters between vision tower and language model; None if unknown.

    Raises:
        ArgumentsError: the settings do not fit the model.
    """
    with torch.device("meta"):
        attachment = attach(model, mode)
    return counted(model, attachment.modules, attachment.shape, projector)


def misfits(model: Any, mode: Mode) -> list[str]:
    """What is wrong with the settings on this model and not in themselves."""
    _, shape = find_decoder(model)
    known = mode.problems()
    return [problem for problem in mode.problems(shape) if problem not in known]
