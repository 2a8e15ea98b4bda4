"""Says what a base is from its config.json alone: its settings, and its language model on the meta device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_steering_plugin.components.model_types import of_llava_type
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.foreign_files import read_json
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.hooks.parameter_names import PROJECTOR_PATH
from llava_steering_plugin.hub import absent, is_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
VISION_PREFIX = "llava"
# Entries of a LLaVA's config that say how images are cut, encoded and marked begin with one of these. Not with "image_"
# alone: transformers' own count their tokens by `image_token_index` and `image_seq_length`.
IMAGE_SETTINGS = (
    *("image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution"),
    *("mm_use_", "mm_patch_", "mm_vision_select_"),
)
# In LLaVA-NeXT, those that say how the frames of a video are laid out begin with one of these.
VIDEO_SETTINGS = ("mm_newline_position", "mm_spatial_pool_", "add_faster_video", "faster_token_stride")
# The beginning of the names of the projector's parameters in LLaVA.
PROJECTOR_PREFIX = f"{PROJECTOR_PATH}."


def projector_of(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """Return the projector and its name in the model; None if the model has none."""
    return family_of(model).projector()


def read_config(name: str) -> dict[str, Any]:
    """Read the config.json of a folder or of a model on the hub, without its weights.

    Raises:
        SteeringError: none there, not JSON, or without a model_type.
    """
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, CONFIG)):
        raise SteeringError(f"{name} has no {CONFIG}. Give the folder of a model, or a model's name on the hub.")
    try:
        described = read_json(_config_file(name))
    except (OSError, ValueError) as error:
        if os.path.exists(name):
            raise SteeringError(f"the config of {name} cannot be read: {error}") from error
        raise SteeringError(f"{absent(name)} Give a folder with a config.json.") from error
    if not isinstance(described, dict):
        raise SteeringError(f"the config.json of {name} holds no settings: it is not that of a model.")
    if not isinstance(described.get("model_type"), str):
        raise SteeringError(f"the config.json of {name} names no model_type, so it is not the config of a model.")
    return described


def _config_file(name: str) -> str:
    """Return the config.json of a folder, or of a model on the hub, which is downloaded.

    Raises:
        OSError, ValueError: there is no model of that name.
    """
    from transformers.utils import cached_file

    if os.path.isdir(name):
        return os.path.join(name, CONFIG)
    if os.path.isfile(name):
        return name
    return str(cached_file(name, CONFIG, local_files_only=not is_reachable()))


def language_model(described: Mapping[str, Any], name: str) -> nn.Module:
    """Build the language model that a config describes, without vision, on the meta device: shapes and no values.

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
    """Return the language model's type and config."""
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
    """Return the class of language-model configs of that type, or of what LLaVA calls llava_<type>; None if unknown."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if component := of_llava_type(f"{VISION_PREFIX}_{kind}"):
        kind = component.model_type
    if kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    registered = f"{VISION_PREFIX}_{kind}"
    if registered not in CONFIG_MAPPING:
        return None
    # A LLaVA that has been imported registers its configs; each extends the one of its language model.
    parents = CONFIG_MAPPING[registered].__mro__[1:]
    return next((parent for parent in parents if issubclass(parent, PretrainedConfig) and parent.model_type), None)
