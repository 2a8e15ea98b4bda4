"""Has upstream's `load_pretrained_model` take an adapter as its model path."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
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
from llava_steering_plugin.upstream.model.language_models import load_by_type
from llava_steering_plugin.upstream.names import display_name
from llava_steering_plugin.upstream.seams import require


def on_mm_utils_import(module: ModuleType) -> None:
    """Have upstream's scripts call an adapter by a name that their rules understand."""
    require(module, "get_model_name_from_path")

    def name(original: Callable[..., str], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        path = args[0] if args else kwargs.get("model_path")
        return (isinstance(path, str) and display_name(path)) or original(*args, **kwargs)

    wrap_function_wrapper(module, "get_model_name_from_path", name)


def on_builder_import(module: ModuleType) -> None:
    """Have `load_pretrained_model` load an adapter's base the way upstream loads it, and then the adapter."""
    signature = inspect.signature(require(module, "load_pretrained_model"))

    def load(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = signature.bind(*args, **kwargs)
        except TypeError:
            # Upstream's own complaint is the one that callers know how to handle (lmms-eval catches it).
            return original(*args, **kwargs)
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
    check_folder(base, "the base")
    tower = (described if "mm_vision_tower" in described else trained).get("mm_vision_tower")
    if isinstance(tower, str):
        check_folder(tower, "the vision tower")
    with tempfile.TemporaryDirectory(prefix="llava-steering-") as staging:
        if "mm_vision_tower" in described:
            call.arguments |= {"model_path": base, "model_base": None, "model_name": name_for(described["model_type"])}
            model_type = described["model_type"]
        else:
            _stage_plain_base(Path(staging), trained, described)
            _leave_projector_unpacked(call)
            call.arguments |= {"model_path": staging, "model_base": base, "model_name": "llava-staged"}
            model_type = trained["model_type"]
        loaded = load_by_type(module, original, call, model_type)
    tokenizer, model = loaded[0], loaded[1]
    parts = load_adapter(model, stored, tokenizer).original
    parts.set_config({key: value for key, value in trained.items() if key.startswith("tokenizer_")})
    if "mm_vision_tower" not in described:
        parts.lend_projector(base)
    return loaded


def _leave_projector_unpacked(call: inspect.BoundArguments) -> None:
    """Ask for upstream's own quantisation, but of the backbone alone.

    The base has no projector, so transformers would draw one: it cannot where the weights are packed already.
    """
    wanted = [bits for bits in (8, 4) if call.arguments.get(f"load_{bits}bit")]
    if not wanted:
        return
    from transformers import BitsAndBytesConfig

    call.arguments |= {f"load_{bits}bit": False for bits in wanted}
    quantisation = BitsAndBytesConfig(
        load_in_8bit=wanted[0] == 8,
        load_in_4bit=wanted[0] == 4,
        llm_int8_skip_modules=["lm_head", "mm_projector"],
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )
    call.arguments["kwargs"] = {**call.arguments.get("kwargs", {}), "quantization_config": quantisation}


_VOCABULARY_FLAGS = ("mm_use_im_patch_token", "mm_use_im_start_end")


def _stage_plain_base(staging: Path, trained: dict[str, Any], described: dict[str, Any]) -> None:
    """Lay out what upstream calls a projector-only checkpoint, for a base that is a plain language model.

    Upstream then builds a LLaVA from the adapter's config.json around that base. The projector file is empty: the
    adapter brings the weights, also in cases (4-bit) where upstream could not load them.
    """
    config = trained | {"vocab_size": described["vocab_size"]}
    config |= dict.fromkeys(_VOCABULARY_FLAGS, False)
    (staging / LLAVA_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    torch.save({}, staging / "mm_projector.bin")


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
