"""Has upstream's `load_pretrained_model` take an adapter as its model path."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from wrapt import wrap_function_wrapper

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.adapters.fit.unmerged import unmerged_lora
from llava_steering_plugin.adapters.parts.image_settings import of_transformers, trained_settings
from llava_steering_plugin.adapters.save_load import load_adapter
from llava_steering_plugin.adapters.stored.folder import LLAVA_CONFIG, AdapterFolder, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import BaseMismatch, SteeringError
from llava_steering_plugin.foreign_files import check_folder
from llava_steering_plugin.modes.base import default_dtype
from llava_steering_plugin.upstream.model.component_checks import check_installed
from llava_steering_plugin.upstream.model.image_layouts import unknown_layout
from llava_steering_plugin.upstream.model.language_models import load_by_type
from llava_steering_plugin.upstream.model.loader_calls import place_like_llava, takes_whole_checkpoints_alone
from llava_steering_plugin.upstream.model.staging import leave_projector_unpacked, stage_projector, stage_whole
from llava_steering_plugin.upstream.model.towers import own_towers
from llava_steering_plugin.upstream.names import display_name
from llava_steering_plugin.upstream.seams import require


def on_mm_utils_import(module: ModuleType) -> None:
    """Have upstream's scripts call an adapter by a name that their rules understand."""
    require(module, "get_model_name_from_path")

    def name(original: Callable[..., str], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        path = args[0] if args else kwargs.get("model_path")
        return (isinstance(path, str) and _own_name(path)) or original(*args, **kwargs)

    wrap_function_wrapper(module, "get_model_name_from_path", name)


def _own_name(path: str) -> str | None:
    try:
        return display_name(path, checked=False)
    except SteeringError:
        return None  # whoever loads the adapter says what is wrong with it


def on_builder_import(module: ModuleType) -> None:
    """Have `load_pretrained_model` load an adapter's base the way upstream loads it, and then the adapter."""
    signature = inspect.signature(require(module, "load_pretrained_model"))

    def load(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = signature.bind(*args, **kwargs)
        except TypeError:
            # Upstream's own complaint is the one that callers know how to handle (lmms-eval catches it).
            return original(*args, **kwargs)
        place_like_llava(original, call)
        given = call.arguments["model_path"]
        folder = find(given) if isinstance(given, str | StoredAdapter) else None
        if folder is None:
            _check_components(given)
            return load_by_type(module, original, call, _model_type(given))
        with default_dtype():  # also where transformers fails and leaves another one
            return _load(module, original, call, given if isinstance(given, StoredAdapter) else folder.read())

    wrap_function_wrapper(module, "load_pretrained_model", load)


def _check_components(model: Any) -> None:
    """Check that the components which a folder's config.json names are installed; a model on the hub loads first."""
    if isinstance(model, str) and os.path.isfile(os.path.join(model, LLAVA_CONFIG)):
        try:
            described = read_config(model)
        except SteeringError:
            return  # LLaVA says what is wrong with it
        check_installed(described)


def _model_type(path: Any) -> str | None:
    """Return the model type of a checkpoint; None if it cannot be read: LLaVA says what is wrong."""
    try:
        return str(read_config(os.fspath(path))["model_type"])
    except (SteeringError, TypeError):
        return None


def _load(module: ModuleType, original: Callable[..., Any], call: inspect.BoundArguments, stored: StoredAdapter) -> Any:
    folder, trained_on = stored.folder, stored.config.base.name_or_path
    base = call.arguments.get("model_base") or trained_on
    if os.path.isdir(base) and find(base) is not None:
        raise BaseMismatch(
            f"{base}, given as the base of the adapter in {folder}, is an adapter itself. Give a model with "
            f"--model-base; this adapter was trained on {trained_on}."
        )
    if advice := unmerged_lora(base):
        raise BaseMismatch(f"the base of the adapter in {folder}: {advice} with --model-base.")
    described = _base_config(base, folder)
    if of_transformers(described):
        raise BaseMismatch(
            f"{base}, the base of the adapter in {folder}, is a model of transformers' own class. Give the same model "
            f"in LLaVA's layout with --model-base; `llava-steering export {base} DST` makes it."
        )
    trained = trained_settings(stored)
    check_installed(described if "mm_vision_tower" in described else trained)
    if reason := unknown_layout(trained):
        raise BaseMismatch(f"the adapter in {folder} was trained on other pictures than it would get here: {reason}.")
    check_folder(base, "the base")
    tower = (described if "mm_vision_tower" in described else trained).get("mm_vision_tower")
    if isinstance(tower, str):
        check_folder(tower, "the vision tower")
    with tempfile.TemporaryDirectory(prefix="llava-steering-") as staging:
        if "mm_vision_tower" in described:
            call.arguments |= {"model_path": base, "model_base": None, "model_name": name_for(described["model_type"])}
            model_type = described["model_type"]
        else:
            model_type = trained["model_type"]
            leave_projector_unpacked(call)
            if takes_whole_checkpoints_alone(original):
                stage_whole(Path(staging), trained, described, base)
                call.arguments |= {"model_path": staging, "model_base": None, "model_name": name_for(model_type)}
            else:
                stage_projector(Path(staging), trained, described)
                call.arguments |= {"model_path": staging, "model_base": base, "model_name": "llava-staged"}
        with own_towers():
            loaded = load_by_type(module, original, call, model_type)
    tokenizer, model = loaded[0], loaded[1]
    model.name_or_path = model.config.name_or_path = base  # a folder that is laid out is gone by now
    parts = load_adapter(model, stored, tokenizer).original
    parts.set_config({key: value for key, value in trained.items() if key.startswith("tokenizer_")})
    if "mm_vision_tower" not in described:
        parts.lend_projector(base)
    return loaded


def _base_config(base: str, folder: AdapterFolder) -> dict[str, Any]:
    try:
        return read_config(base)
    except SteeringError as error:
        raise BaseMismatch(
            f"the adapter in {folder} belongs to the base {base}, which cannot be found or read: {error} If the base "
            "has moved, say where it is with --model-base."
        ) from error


def name_for(model_type: str) -> str:
    """Return a name from which upstream's rules pick the class that the base's config.json names."""
    return "llava-" + (model_type.removeprefix("llava").strip("_-") or "llama")
