"""Read the settings that a tower of transformers is released with: config.json and preprocessor_config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hub import absent, is_reachable

# transformers' number for bicubic, the usual interpolation of vision towers.
BICUBIC = 3


def model_settings(source: str, tower: str, kinds: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the vision part of config.json.

    Args:
        source: a folder, or a name on the hub.
        tower: the component's name, for messages.
        kinds: model types that the component takes.

    Raises:
        ArgumentsError: no source is given, there is no such model, or it is of another type.
    """
    from transformers import PretrainedConfig

    if not source:
        raise ArgumentsError(f"--vision_tower {tower} needs a source: {tower}:FOLDER, or {tower}:NAME on the hub")
    try:
        described, _ = PretrainedConfig.get_config_dict(source, local_files_only=not is_reachable())
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"--vision_tower {tower}:{source}: {_absent(source, 'config.json', error)}") from error
    kind = described.get("model_type")
    if kind not in kinds:
        raise ArgumentsError(
            f"--vision_tower {tower}:{source}: its config.json describes a model of type {kind!r}; "
            f"the tower {tower!r} takes {' and '.join(map(repr, kinds))}"
        )
    vision = described.get("vision_config")
    return vision if isinstance(vision, dict) else described


def processor_settings(source: str, tower: str) -> Mapping[str, Any]:
    """Return preprocessor_config.json: how images are prepared.

    Raises:
        ArgumentsError: it is missing.
    """
    from transformers.image_processing_utils import ImageProcessingMixin

    try:
        described, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=not is_reachable())
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"--vision_tower {tower}:{source}: the image processor is missing: "
            f"{_absent(source, 'preprocessor_config.json', error)}"
        ) from error
    settings: Mapping[str, Any] = described
    return settings


def clip_processor(side: int, prepared: Mapping[str, Any]) -> Any:
    """Return a processor whose images keep their shape: the shorter side becomes `side`, and the middle is cut out.

    LLaVA pads images to squares: of these, all is kept. Processors of classifiers cut a margin off.

    Args:
        side: of the image that the tower takes, in pixels.
        prepared: image_mean, image_std and resample of the released processor.
    """
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=prepared.get("resample", BICUBIC),
        image_mean=list(prepared["image_mean"]),
        image_std=list(prepared["image_std"]),
    )


def number(settings: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """Return a size that must be a positive integer.

    Raises:
        ArgumentsError: it is none.
    """
    value = settings.get(name, default)
    if type(value) is not int or value < 1:
        raise ArgumentsError(f"{where}: {name} is {value!r:.50}; a positive number is expected")
    return value


def check_selection(layer: Any, feature: str, layers: int, where: str, *, has_class: bool) -> None:
    """Check --mm_vision_select_layer and --mm_vision_select_feature.

    Args:
        layers: of the tower; hidden states are its embeddings and what each layer makes of them.
        where: the tower, for messages.
        has_class: the tower has a class token.

    Raises:
        ArgumentsError: the tower has no such layer or feature.
    """
    problems = []
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        problems.append(f"--mm_vision_select_layer is {layer!r:.50}; the tower has {layers} layers")
    features = ("patch", "cls_patch") if has_class else ("patch",)
    if feature not in features:
        hint = " (this tower has no class token)" * (feature == "cls_patch")
        problems.append(f"--mm_vision_select_feature is {feature!r:.50}; the tower has {', '.join(features)}{hint}")
    if problems:
        raise ArgumentsError(f"{where}: {'; '.join(problems)}")


def _absent(source: str, file: str, error: Exception) -> str:
    if os.path.isdir(source):
        if os.path.isfile(os.path.join(source, file)):
            return f"{file} cannot be read: {error}"
        return f"{source} has no {file}"
    return absent(source)
