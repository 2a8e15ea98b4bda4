"""Gradient checkpointing trains the adapter, whatever of the model is frozen and whatever LLaVA has replaced in it.

Covers `hooks/checkpointing.py` through LLaVA's own train().
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import assert_trained, losses, text_data
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process
from transformers import PreTrainedModel

from llava_steering_plugin.adapters.stored.folder import StoredAdapter
from llava_steering_plugin.adapters.stored.locate import read

MODES: dict[str, dict[str, object]] = {
    "mores": {"tuning_mode": "mores", "mores_tokens": "all"},
    "mixlora": {
        "tuning_mode": "mixlora",
        "mixlora_factors": 4,
        "mixlora_rank": 2,
        "mixlora_targets": "q_proj,down_proj",
    },
}
# A tokenizer that grows makes LLaVA put other embeddings into the model, without the hooks of those before.
GROWN: dict[str, dict[str, object]] = {
    "no token": {},
    "start and end": {"mm_use_im_start_end": True},
    "patch": {"mm_use_im_patch_token": None},
    "padding": {"version": "v0"},
    "all tokens": {"version": "v0", "mm_use_im_start_end": True, "mm_use_im_patch_token": None},
}
PROJECTOR = {"projector frozen": True, "projector trained": False}
REENTRANT = {"reentrant": True, "not reentrant": False}
# With a trained projector a gradient comes from there, so that the embeddings matter less.
GRID = [
    case
    for case in itertools.product(MODES, GROWN, PROJECTOR, REENTRANT)
    if case[2] == "projector frozen" or case[1] == "all tokens"
]
SHORT: dict[str, object] = {"max_steps": 3, "per_device_train_batch_size": 2, "bf16": False}


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> StoredAdapter:
    train_in_process(train_flags(tiny, output, {**SHORT, **overrides}))
    stored = read(output)
    assert_trained(stored)
    return stored


def checkpoint_with(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    """Choose how layers are recomputed: no flag of transformers 4.37 does."""
    enable = PreTrainedModel.gradient_checkpointing_enable

    def chosen(model: Any, gradient_checkpointing_kwargs: Any = None) -> None:
        enable(model, {"use_reentrant": reentrant})

    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", chosen)


@pytest.mark.parametrize(("mode", "grown", "projector", "reentrant"), GRID)
def test_an_adapter_learns_whatever_is_frozen_and_however_the_tokenizer_has_grown(
    tiny: TinyLlava,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    grown: str,
    projector: str,
    reentrant: str,
) -> None:
    checkpoint_with(monkeypatch, REENTRANT[reentrant])
    train(tiny, tmp_path / "run", {**MODES[mode], **GROWN[grown], "freeze_mm_mlp_adapter": PROJECTOR[projector]})


@pytest.mark.parametrize("mode", MODES)
def test_it_learns_under_checkpointing_what_it_learns_without(tiny: TinyLlava, tmp_path: Path, mode: str) -> None:
    flags = {**MODES[mode], **GROWN["all tokens"], "freeze_mm_mlp_adapter": True}
    plain = train(tiny, tmp_path / "plain", {**flags, "gradient_checkpointing": False})
    recomputed = train(tiny, tmp_path / "recomputed", flags)
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"))
    for name, value in plain.tensors.items():
        torch.testing.assert_close(recomputed.tensors[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_it_learns_from_text_alone(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = {
        **MODES["mixlora"],
        **GROWN["all tokens"],
        "freeze_mm_mlp_adapter": True,
        "data_path": text_data(tiny, tmp_path),
    }
    train(tiny, tmp_path / "run", {**flags, "group_by_modality_length": False})
