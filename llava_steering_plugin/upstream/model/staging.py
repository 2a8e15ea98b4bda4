"""Lay out a folder from which upstream's loader builds a LLaVA around a plain language model, for an adapter."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from llava_steering_plugin.adapters.stored.folder import LLAVA_CONFIG
from llava_steering_plugin.errors import BaseMismatch

_VOCABULARY_FLAGS = ("mm_use_im_patch_token", "mm_use_im_start_end")
# What a language model on the hub is loaded from; its weights in a second format would be as large again.
_FILES = ("*.json", "*.model", "*.txt", "*.tiktoken")


def stage_projector(staging: Path, trained: dict[str, Any], described: dict[str, Any]) -> None:
    """Lay out what upstream calls a projector-only checkpoint, for a base that is a plain language model.

    Upstream then builds a LLaVA from the adapter's config.json around that base. The projector file is empty: the
    adapter brings the weights, also in cases (4-bit) where upstream could not load them.

    Args:
        staging: an empty folder.
        trained: config.json of the LLaVA that the adapter was trained on.
        described: config.json of the base.
    """
    _write_config(staging, trained, described)
    torch.save({}, staging / "mm_projector.bin")


def stage_whole(staging: Path, trained: dict[str, Any], described: dict[str, Any], base: str) -> None:
    """Lay out a LLaVA as one checkpoint: links to the files of the plain language model, and the adapter's config.json.

    For loaders that take a separate base for some language models only. What the files lack, above all the projector,
    is drawn at random, until the adapter brings it.

    Args:
        staging, trained, described: as for `stage_projector`.
        base: folder or hub id of the language model.
    """
    for file in _folder_of(base).iterdir():
        if file.is_file() and file.name != LLAVA_CONFIG:
            (staging / file.name).symlink_to(file.resolve())
    _write_config(staging, trained, described)


def _write_config(staging: Path, trained: dict[str, Any], described: dict[str, Any]) -> None:
    config = trained | {"vocab_size": described["vocab_size"]} | dict.fromkeys(_VOCABULARY_FLAGS, False)
    (staging / LLAVA_CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _folder_of(base: str) -> Path:
    if os.path.isdir(base):
        return Path(base)
    from huggingface_hub import snapshot_download

    for weights in ("*.safetensors", "pytorch_model*.bin"):
        try:
            folder = Path(snapshot_download(base, allow_patterns=[*_FILES, weights]))
        except (OSError, ValueError) as error:
            raise BaseMismatch(f"the base {base} cannot be fetched: {error}") from error
        if any(folder.glob(weights)):
            return folder
    raise BaseMismatch(f"the base {base} has neither safetensors nor pytorch_model*.bin to load it from.")


def leave_projector_unpacked(call: inspect.BoundArguments) -> None:
    """Ask for upstream's own quantisation, but of the backbone alone.

    The base has no projector, so transformers would draw one: it cannot where the weights are packed already.

    Args:
        call: of upstream's `load_pretrained_model`; its arguments are changed.
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
