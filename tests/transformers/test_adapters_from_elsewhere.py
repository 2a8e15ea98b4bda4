"""Adapters that another model of the same base has trained: what loads on transformers' own classes, and what does not.

That the answers are the same is in `tests/everywhere`; here are bases with other rows, and what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import change_llava_config, change_tensors, header_of
from placeholders import IMAGE, KINDS, TEXT, Kind
from steered import strengthen
from torch import Tensor

from llava_steering_plugin import attach, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.errors import AdapterError, BaseMismatch, SteeringError
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.hooks.owner import owner_of
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture
def llava() -> Kind:
    return KINDS["Llava"]()


@pytest.fixture
def saved(llava: Kind, tmp_path: Path) -> Path:
    """An adapter with a projector of its own; the model is as it was."""
    return save(llava, tmp_path / "adapter")


def save(kind: Kind, folder: Path) -> Path:
    attachment = strengthen(attach(kind.model, MoReS(rank=2)))
    before = {name: value.detach().clone() for name, value in image_parameters(kind.model).items()}
    attachment.extras |= before.keys()
    with torch.no_grad():
        for name in before:
            kind.model.get_parameter(name).mul_(1.5)
    save_adapter(kind.model, folder)
    remove_adapter(kind.model)
    with torch.no_grad():
        for name, value in before.items():
            kind.model.get_parameter(name).copy_(value)
    return folder


@torch.no_grad()
def logits(kind: Kind) -> Tensor:
    found: Tensor = kind.model(**kind.batch()).logits
    return found


def refusal(kind: Kind, folder: Path, expected: type[SteeringError] = AdapterError) -> str:
    before = {name: value.clone() for name, value in kind.model.state_dict().items()}
    with pytest.raises(expected) as caught:
        load_adapter(kind.model, folder)
    assert owner_of(kind.model) is None
    assert all(torch.equal(value, before[name]) for name, value in kind.model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_parameter_has_one_name_in_a_file_and_gets_its_own_back(kind: str) -> None:
    model = KINDS[kind]().model
    family = family_of(model)
    names = [name for name, _ in model.named_parameters()]
    canonical = [family.canonical(name) for name in names]
    assert len(set(canonical)) == len(names)
    assert [family.local(name) for name in canonical] == names
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"} <= set(canonical)


def test_names_of_the_decoder_the_tower_and_the_head_are_llavas(llava: Kind) -> None:
    family = family_of(llava.model)
    found = {family.canonical(name) for name, _ in llava.model.named_parameters()}
    assert {
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
    } <= found
    assert family.local("model.mm_projector.weight") == "model.multi_modal_projector.linear_1.weight"


def test_a_base_is_the_same_with_more_rows_for_images_and_padding(llava: Kind, saved: Path) -> None:
    """The rows behind the token for images are no base's own: llava-hf's have 64, LLaVA's none."""
    ids = header_rows(saved)
    assert int(ids.max()) == IMAGE - 1
    load_adapter(llava.model, saved)
    expected = logits(llava)[..., :IMAGE]
    remove_adapter(llava.model)
    assert not torch.equal(logits(llava)[..., :IMAGE], expected)
    llava.model.resize_token_embeddings(128)
    with torch.no_grad():
        llava.model.get_input_embeddings().weight[IMAGE:] = 7.0
    load_adapter(llava.model, saved)
    # Features take the places of the token for images, so its row is never read.
    torch.testing.assert_close(logits(llava)[..., :IMAGE], expected, atol=1e-4, rtol=1e-4)
    wide = saved.parent / "of-the-wide-one"
    save_adapter(llava.model, wide)
    assert torch.equal(header_rows(wide), ids)
    assert describe(owner_of(llava.model)).base.vocab_size == IMAGE  # type: ignore[arg-type]


def header_rows(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")["fingerprint.ids"]


def test_another_base_is_refused(llava: Kind, saved: Path) -> None:
    with torch.no_grad():
        llava.model.get_input_embeddings().weight[:IMAGE].neg_()
    assert "same shape, other weights" in refusal(llava, saved, BaseMismatch)


def test_a_file_says_by_llavas_names_which_features_it_knows(llava: Kind, saved: Path) -> None:
    assert '"mm_vision_select_layer": -2' in header_of(saved)["llava_config"]
    assert '"mm_vision_select_feature": "patch"' in header_of(saved)["llava_config"]
    llava.model.config.vision_feature_layer = -1
    assert "mm_vision_select_layer -2; this model has -1" in refusal(llava, saved)
    llava.model.config.vision_feature_layer = -2
    llava.model.config.vision_feature_select_strategy = "full"
    assert "mm_vision_select_feature 'patch'; this model has 'cls_patch'" in refusal(llava, saved)


def test_a_projector_that_computes_something_else_is_refused(llava: Kind, saved: Path) -> None:
    change_llava_config(saved, mm_projector_type="linear")
    assert "trained as mm_projector_type 'linear'; this model's is projector_hidden_act 'gelu'" in refusal(llava, saved)


def test_a_projector_of_another_shape_or_with_more_parts_is_refused(llava: Kind, saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base.model.mm_projector.0.weight"] = torch.zeros(32, 48)
        tensors["base.model.mm_projector.4.weight"] = torch.zeros(32, 32)
        tensors["base.model.query_tokens"] = torch.zeros(3)

    message = refusal(llava, change_tensors(saved, change))
    assert "multi_modal_projector.linear_1.weight is [32, 48] where the model needs [32, 32]" in message
    assert "multi_modal_projector.4.weight has no place" in message and "query_tokens has no place" in message


def test_one_tensor_under_two_names_is_refused(llava: Kind, saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base.model.mm_projector.weight"] = tensors["base.model.mm_projector.0.weight"].clone()

    assert "linear_1.weight of this model under two names" in refusal(llava, change_tensors(saved, change))


def test_added_tokens_that_are_this_models_for_images_are_refused(llava: Kind, tmp_path: Path) -> None:
    attachment = strengthen(attach(llava.model, MoReS(rank=2)))
    attachment.config = replace(describe(attachment), added_tokens={"<im_start>": IMAGE, "<im_end>": IMAGE + 2})
    save_adapter(llava.model, tmp_path)
    remove_adapter(llava.model)
    assert f"<im_start> has id {IMAGE}, which stands for an image" in refusal(llava, tmp_path)


def test_two_tokens_for_images_are_refused() -> None:
    kind = KINDS["Qwen2.5-VL"]()
    kind.model.config.image_token_index = 63
    with pytest.raises(SteeringError, match=f"image_token_id {IMAGE} and image_token_index 63"):
        attach(kind.model, "mores", rank=1)


def test_the_vocabulary_of_a_model_whose_token_for_images_is_among_others_counts_whole() -> None:
    kind = KINDS["Llava"]()
    kind.model.config.image_token_id = 10
    rows = family_of(kind.model).own_rows(TEXT["vocab_size"])
    assert rows == [row for row in range(TEXT["vocab_size"]) if row != 10]
