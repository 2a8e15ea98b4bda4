"""What a pool refuses (`pool/reading.py`): adapters that do not fit its model, or cannot share one with others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_llava_config
from pooled import BASE, alone, answer, hooks_of
from steered import strengthen
from transformers import LlamaTokenizer

from llava_steering_plugin import AdapterPool, attach, remove, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.folder import EXTRA
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.errors import AdapterError, ArgumentsError, BaseMismatch
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.pool.projectors import own_projector

pytest_plugins = ["steered_fixtures", "pooled_fixtures"]

Folders = dict[str, Path]


def test_what_does_not_fit_is_refused_with_the_reason_and_changes_nothing(
    pool: AdapterPool, shared: Any, frozen: Any, folders: Folders, tmp_path: Path
) -> None:
    before, hooks, text = pool.names(), hooks_of(shared), answer(shared, "cats")
    damaged = shutil.copytree(folders["cats"], tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    stranger = tmp_path / "stranger"
    attachment = strengthen(attach(frozen, MoReS()))
    config = describe(attachment)
    attachment.config = replace(config, base=replace(config.base, hidden_size=4096))
    save_adapter(frozen, stranger)
    remove(frozen)
    for folder, kind, message in (
        (tmp_path / "nowhere", AdapterError, "nowhere"),
        (damaged, AdapterError, "damaged"),
        (stranger, BaseMismatch, "width 4096"),
    ):
        with pytest.raises(kind, match=message):
            pool.load("cats", folder)
    for name in ("", "  ", BASE, 3):
        with pytest.raises(ArgumentsError, match="cannot be called"):
            pool.load(name, folders["cats"])  # type: ignore[arg-type]
    assert (pool.names(), hooks_of(shared), answer(shared, "cats")) == (before, hooks, text)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("image_aspect_ratio", "square"), ("mm_vision_select_layer", -1), ("mm_use_im_start_end", True)],
)
def test_an_adapter_that_saw_its_images_otherwise_is_refused_with_the_setting(
    pool: AdapterPool, folders: Folders, tmp_path: Path, setting: str, value: Any
) -> None:
    other = shutil.copytree(folders["cats"], tmp_path / "other")
    change_llava_config(other, **{setting: value})
    with pytest.raises(AdapterError, match=rf"(?s)cannot share.*model_worker --model-path.*{setting}"):
        pool.load("other", other)


def test_settings_that_every_server_chooses_for_itself_are_no_reason_to_refuse(
    pool: AdapterPool, shared: Any, folders: Folders, tmp_path: Path
) -> None:
    other = shutil.copytree(folders["cats"], tmp_path / "other")
    change_llava_config(
        other, tokenizer_padding_side="right", tokenizer_model_max_length=512, mm_patch_merge_type="flat"
    )
    pool.load("other", other)
    assert answer(shared, "other") == answer(shared, "cats")


def test_an_adapter_with_weights_of_its_own_beside_the_projector_is_refused_and_equal_ones_are_not(
    pool: AdapterPool, shared: Any, model: Any, tmp_path: Path
) -> None:
    name = "model.embed_tokens.weight"
    attachment = strengthen(attach(model, MoReS()))
    attachment.extras.add(name)
    save_adapter(model, tmp_path / "equal")
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    with torch.no_grad():
        weight[7] += 1
        save_adapter(model, tmp_path / "other")
        weight.copy_(before)
    pool.load("equal", tmp_path / "equal")
    assert pool.details("equal").parameters == pool.details("equal").bytes // 4 < 1000
    with pytest.raises(AdapterError, match=rf"(?s)cannot share.*its own {name}"):
        pool.load("other", tmp_path / "other")


def test_added_tokens_are_refused_unless_the_model_knows_them_already(
    shared: Any, model: Any, tiny: Any, tmp_path: Path
) -> None:
    attachment = strengthen(attach(model, MoReS()))
    attachment.config = replace(describe(attachment), added_tokens={"<im_start>": 650})
    save_adapter(model, tmp_path / "tokens")
    tokenizer = LlamaTokenizer.from_pretrained(tiny.llm)
    pool = AdapterPool(shared, tokenizer)
    with pytest.raises(AdapterError, match=r"(?s)cannot share.*vocabulary: <im_start>"):
        pool.load("tokens", tmp_path / "tokens")
    known = tokenizer.convert_ids_to_tokens(650)
    attachment.config = replace(attachment.config, added_tokens={known: 650})
    save_adapter(model, tmp_path / "known")
    pool.load("known", tmp_path / "known")
    assert answer(shared, "known") != answer(shared)


def test_a_projector_of_a_quantised_model_is_replaced_by_plain_linears(frozen: Any, folders: Folders) -> None:
    class Packed(torch.nn.Linear):
        """A linear whose weight has another shape than its features say, as quantised ones have."""

    tensors = {
        name.removeprefix("model.mm_projector."): value for name, value in read(folders["birds"]).section(EXTRA).items()
    }
    packed = torch.nn.Sequential(Packed(64, 64), torch.nn.GELU(), Packed(64, 64))
    for layer in (packed[0], packed[2]):
        layer.weight = torch.nn.Parameter(torch.zeros(2048, 1, dtype=torch.uint8), requires_grad=False)
    own = own_projector(packed, tensors, torch.float32)
    assert type(own[0]) is torch.nn.Linear and torch.equal(own[2].weight, tensors["2.weight"])
    with alone(frozen, folders["birds"]):
        features = torch.randn(2, 16, 64)
        torch.testing.assert_close(own(features), frozen.get_model().mm_projector(features))


def test_a_projector_that_accelerate_has_placed_is_copied_with_its_own_forward(frozen: Any, folders: Folders) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    prefix = "model.mm_projector."
    tensors = {name.removeprefix(prefix): value for name, value in read(folders["birds"]).section(EXTRA).items()}
    projector, features = frozen.get_model().mm_projector, torch.randn(2, 16, 64)
    expected = own_projector(projector, tensors, torch.float32)(features)
    add_hook_to_module(projector, AlignDevicesHook(execution_device="cpu"))
    try:
        own = own_projector(projector, tensors, torch.float32)
        assert torch.equal(own(features), expected)
        assert not torch.equal(projector(features), expected)
    finally:
        remove_hook_from_module(projector)
