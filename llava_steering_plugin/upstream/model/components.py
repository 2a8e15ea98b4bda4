"""Have LLaVA build vision towers and connectors that are components, by the flags and config entries that it has."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt import wrap_function_wrapper

from llava_steering_plugin.components.image_tokens import CONNECTOR, FEATURE, LAYER, tower_name, tower_shape
from llava_steering_plugin.components.model_types import of_llava_type
from llava_steering_plugin.components.named import named_connector, named_tower, unknown_connector, unknown_tower
from llava_steering_plugin.components.registry import CONNECTORS, LANGUAGE_MODELS, TOWERS, split
from llava_steering_plugin.components.vision_tower import VisionTower
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.upstream.model.component_checks import MODEL_TYPE, RECORD, check_installed
from llava_steering_plugin.upstream.model.language_models import types_of_llava
from llava_steering_plugin.upstream.model.towers import stays_empty
from llava_steering_plugin.upstream.seams import require


def on_arch_import(module: ModuleType) -> None:
    """Wrap the two functions by which a LLaVA gets its vision tower and its projector."""
    require(module, "build_vision_tower")
    wrap_function_wrapper(module, "build_vision_tower", _tower)
    require(module, "build_vision_projector")
    wrap_function_wrapper(module, "build_vision_projector", _connector)


def _tower(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings = args[0] if args else kwargs["vision_tower_cfg"]
    name = tower_name(_entries(settings))
    check_installed(_entries(settings))
    tower = named_tower(name, getattr(settings, LAYER, None), getattr(settings, FEATURE, None))
    if tower is not None:
        empty = bool(kwargs.get("delay_load", False)) or stays_empty(settings)
        return VisionTower(tower, name, delay_load=empty)
    if stays_empty(settings):
        kwargs = {**kwargs, "delay_load": True}
    try:
        return original(*args, **kwargs)
    except ValueError as error:
        if "Unknown vision tower" in str(error):
            raise unknown_tower(str(name)) from error
        raise


def _connector(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    config = args[0] if args else kwargs["config"]
    text = getattr(config, CONNECTOR, None)
    _record(config)
    connector = named_connector(text)
    if connector is None:
        try:
            return original(*args, **kwargs)
        except ValueError as error:
            if "Unknown projector type" in str(error):
                raise unknown_connector(str(text)) from error
            raise
    tokens, width = tower_shape(_entries(config), _clip_config).tokens, config.hidden_size
    if tokens.width != config.mm_hidden_size:
        raise ArgumentsError(
            f"the config says that image tokens have {config.mm_hidden_size} features (mm_hidden_size), and the vision "
            f"tower {tower_name(_entries(config))} gives {tokens.width}"
        )
    if problems := connector.problems(tokens, width):
        raise ArgumentsError(listing(f"the connector {text} cannot be built", problems))
    return connector.build(tokens, width)


def _entries(settings: Any) -> dict[str, Any]:
    """Return the entries of a config, or of flags, as a dict."""
    return dict(vars(settings))


def _clip_config(name: str) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    described: dict[str, Any] = CLIPVisionConfig.from_pretrained(name).to_dict()
    return described


def _record(config: Any) -> None:
    """Write into the config, which is saved with every checkpoint, which packages its components come from."""
    used = {}
    for group, key, text in (
        (TOWERS, "mm_vision_tower", getattr(config, "mm_vision_tower", None)),
        (CONNECTORS, CONNECTOR, getattr(config, CONNECTOR, None)),
    ):
        name = split(text)[0] if isinstance(text, str) else ""
        try:
            component = named_tower(text) if group is TOWERS else named_connector(text)
        except SteeringError:
            continue  # said when it is built
        if component is not None:
            used[key] = {"name": name, "package": group.package(name)}
    # Of a plain base, the instance says what the base's config.json says; what is saved is the class's.
    model_type = str(getattr(type(config), MODEL_TYPE, ""))
    language_model = None if model_type in types_of_llava() else of_llava_type(model_type)
    if language_model is not None:
        used[MODEL_TYPE] = {"name": language_model.name, "package": LANGUAGE_MODELS.package(language_model.name)}
    if used:
        setattr(config, RECORD, used)
    elif hasattr(config, RECORD):
        delattr(config, RECORD)
