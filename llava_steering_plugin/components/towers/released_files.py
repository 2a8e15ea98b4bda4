"""Read the settings that a tower of transformers is released with: config.json and preprocessor_config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.foreign_files import check_folder, read_json
from llava_steering_plugin.hub import absent, is_reachable

# transformers' number for bicubic, the usual interpolation of vision towers.
BICUBIC = 3


def model_settings(
    source: str, tower: str, kinds: tuple[str, ...], refused: Mapping[str, str] = MappingProxyType({})
) -> Mapping[str, Any]:
    """Return the vision part of config.json.

    Args:
        source: a folder, or a name on the hub.
        tower: the component's name, for messages.
        kinds: model types that the component takes.
        refused: what to say further of types that one could take for these.

    Raises:
        SteeringError: no source is given, there is no such model, or it is of another type; or there is something in
            its folder for which a program would wait.
    """
    if not source:
        raise ArgumentsError(f"--vision_tower {tower} needs a source: {tower}:FOLDER, or {tower}:NAME on the hub")
    where = f"--vision_tower {tower}:{source}"
    check_folder(source, f"{where}: the folder")
    try:
        described = _read(source, "config.json")
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"{where}: {_absent(source, 'config.json', error)}") from error
    kind = described.get("model_type")
    if kind not in kinds:
        raise ArgumentsError(
            f"{where}: its config.json describes a model of type {kind!r}; the tower {tower!r} takes "
            f"{' and '.join(map(repr, kinds))}{refused.get(str(kind), '')}"
        )
    vision = described.get("vision_config")
    return vision if isinstance(vision, dict) else described


def processor_settings(source: str, tower: str) -> Mapping[str, Any]:
    """Return preprocessor_config.json: how images are prepared.

    Raises:
        ArgumentsError: it is missing.
    """
    try:
        return _read(source, "preprocessor_config.json")
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"--vision_tower {tower}:{source}: the image processor is missing: "
            f"{_absent(source, 'preprocessor_config.json', error)}"
        ) from error


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


def _read(source: str, file: str) -> dict[str, Any]:
    """Return what a JSON file of a folder, or of a model on the hub, holds.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no JSON object.
    """
    if os.path.isdir(source):
        path = os.path.join(source, file)
    else:
        from transformers.utils import cached_file

        path = cached_file(source, file, local_files_only=not is_reachable())
    described = read_json(path)
    if not isinstance(described, dict):
        raise ValueError("it holds no object")
    return described


def _absent(source: str, file: str, error: Exception) -> str:
    if os.path.isdir(source):
        if os.path.isfile(os.path.join(source, file)):
            return f"{file} cannot be read: {error}"
        return f"{source} has no {file}"
    return absent(source)
