"""Rows go through the projectors of their own adapters in transformers' classes (`pool/image_features.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from placeholders import IMAGE, KINDS, PAD, Kind
from steered import strengthen
from torch import Tensor

from llava_steering_plugin import AdapterPool, attach, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.errors import AdapterError, ArgumentsError, TokenMapError
from llava_steering_plugin.modes.mores import MoReS

BASE = "__base__"
# What has a projector that is known here; in tiles, with an image_newline, as well.
WITH_PROJECTOR = ["Llava", "LlavaNext", "LlavaOnevision"]
Folders = Mapping[str, Path]


@pytest.fixture(scope="module", params=WITH_PROJECTOR)
def kind(request: pytest.FixtureRequest) -> Kind:
    found = KINDS[request.param]()
    found.model.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def llava() -> Kind:
    found = KINDS["Llava"]()
    found.model.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def folders(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return saved(kind, tmp_path_factory.mktemp("adapters"))


def saved(kind: Kind, folder: Path) -> Folders:
    """Two adapters with image parts of their own, and one without; the model is as it was."""
    found = {}
    for seed, name in enumerate(("one", "other", "frozen")):
        attachment = strengthen(attach(kind.model, MoReS(rank=2, tokens="all")), seed)
        parts = image_parameters(kind.model) if name != "frozen" else {}
        before = {key: value.detach().clone() for key, value in parts.items()}
        generator = torch.Generator().manual_seed(seed)
        for value in parts.values():
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
        attachment.extras |= parts.keys()
        found[name] = folder / name
        save_adapter(kind.model, found[name])
        remove_adapter(kind.model)
        for key, value in before.items():
            kind.model.get_parameter(key).data.copy_(value)
    return found


@pytest.fixture
def pool(kind: Kind, folders: Folders) -> Iterator[AdapterPool]:
    made = AdapterPool(kind.model)
    for name, folder in folders.items():
        made.load(name, folder)
    yield made
    made.remove()
    assert "get_image_features" not in vars(kind.model.base_model)


@torch.no_grad()
def logits(kind: Kind, batch: Mapping[str, Any], **named: Any) -> Tensor:
    found: Tensor = kind.model(**batch, **named).logits
    return found


def generated(kind: Kind, batch: Mapping[str, Any], **how: Any) -> list[list[int]]:
    answers = kind.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, **how)
    found: list[list[int]] = answers[:, -4:].tolist()
    return found


def alone(kind: Kind, folders: Folders, name: str, batch: Mapping[str, Any], **how: Any) -> tuple[Tensor, list[Any]]:
    """The answers of the whole batch with one adapter on the model, without any pool."""
    if name == BASE:
        return logits(kind, batch), generated(kind, batch, **how)
    load_adapter(kind.model, folders[name])
    found = logits(kind, batch), generated(kind, batch, **how)
    remove_adapter(kind.model)
    return found


def test_each_row_has_its_own_projector_and_newline(kind: Kind, folders: Folders) -> None:
    batch = kind.batch()
    names = ["one", "other", "frozen", BASE]
    expected = {name: alone(kind, folders, name, batch) for name in names}
    pool = AdapterPool(kind.model)
    for name, folder in folders.items():
        pool.load(name, folder)
    try:
        for named in (["one", "other"], ["other", BASE], ["frozen", "one"], [BASE, "one"], ["one", "one"]):
            together, answers = logits(kind, batch, adapter_names=named), generated(kind, batch, adapter_names=named)
            for row, name in enumerate(named):
                there = batch["attention_mask"][row].bool()
                torch.testing.assert_close(together[row, there], expected[name][0][row, there], atol=1e-4, rtol=1e-4)
                assert answers[row] == expected[name][1][row]
        of_others = (expected["one"][0] - expected["other"][0]).abs().max()
        assert of_others > 0.1  # or rows could be swapped unseen
        assert torch.equal(logits(kind, batch, adapter_names="one"), expected["one"][0])
        assert torch.equal(logits(kind, batch), expected[BASE][0])
    finally:
        pool.remove()


def test_beams_and_several_answers_have_the_projector_of_their_row(
    kind: Kind, folders: Folders, pool: AdapterPool
) -> None:
    batch, names = kind.batch(), ["one", "other"]
    beams = generated(kind, batch, num_beams=2, adapter_names=names)
    for row, name in enumerate(names):
        assert generated(kind, batch, num_beams=2, adapter_names=name)[row] == beams[row]


def test_the_vision_tower_runs_once_however_many_projectors_there_are(kind: Kind, pool: AdapterPool) -> None:
    calls = []
    handle = kind.model.base_model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    logits(kind, kind.batch(), adapter_names=["one", "other"])
    handle.remove()
    assert calls == [1]


def several(kind: Kind) -> dict[str, Tensor]:
    """A row with two images, one without any, and one with one."""
    rows = [[5, *[IMAGE] * 4, 9, *[IMAGE] * 4, 8, 3], [7, 6, 4], [4, 7, *[IMAGE] * 4, 2]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **kind.images(3)}


def test_rows_with_several_images_or_none_keep_their_own(llava: Kind, tmp_path: Path) -> None:
    folders, batch = saved(llava, tmp_path), several(llava)
    names = ["one", "frozen", "other"]
    expected = {name: alone(llava, folders, name, batch) for name in names}
    pool = AdapterPool(llava.model)
    for name, folder in folders.items():
        pool.load(name, folder)
    try:
        together, answers = logits(llava, batch, adapter_names=names), generated(llava, batch, adapter_names=names)
        for row, name in enumerate(names):
            there = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, there], expected[name][0][row, there], atol=1e-4, rtol=1e-4)
            assert answers[row] == expected[name][1][row]
        # Two images' worth of placeholders in one row and half of one in another: nobody knows whose they are.
        odd = dict(batch)
        odd["input_ids"] = batch["input_ids"].clone()
        odd["input_ids"][0, odd["input_ids"][0].tolist().index(IMAGE)] = 9
        odd["input_ids"][1, -1] = IMAGE
        with pytest.raises(TokenMapError, match=r"\[7, 1, 4\] placeholders, and its images \[4, 4, 4\] features"):
            logits(llava, odd, adapter_names=names)
    finally:
        pool.remove()


def test_features_that_were_made_before_are_refused(llava: Kind, tmp_path: Path) -> None:
    batch = llava.batch()
    made = llava.model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    folders = saved(llava, tmp_path)
    pool = AdapterPool(llava.model)
    for name, folder in folders.items():
        pool.load(name, folder)
    try:
        with pytest.raises(ArgumentsError, match="Pass the images themselves"):
            logits(llava, batch, mm_encoder_outputs={"image": made}, adapter_names="one")
        logits(llava, batch, mm_encoder_outputs={"image": made}, adapter_names="frozen")
    finally:
        pool.remove()


def test_a_projector_that_has_no_name_here_is_refused_by_its_own(tmp_path: Path) -> None:
    kind = KINDS["Qwen2.5-VL"]()
    attachment = strengthen(attach(kind.model, MoReS(rank=2, tokens="all")))
    name = "model.visual.merger.mlp.0.weight"
    attachment.extras.add(name)
    with torch.no_grad():
        kind.model.get_parameter(name).mul_(1.5)
    save_adapter(kind.model, tmp_path)
    remove_adapter(kind.model)
    with torch.no_grad():
        kind.model.get_parameter(name).div_(1.5)
    with pytest.raises(AdapterError, match=f"brings its own {name}"):
        AdapterPool(kind.model).load("one", tmp_path)
