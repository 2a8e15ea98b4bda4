"""What a LLaVA makes of adapters that transformers' own class has trained, and of other projectors than its own.

Covers `hooks/parameter_names.py`, `adapters/fit/projector_kind.py` and `upstream/model/loading.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_llava_config, change_tensors, set_header
from placeholders import TEXT, VISION
from steered import load_llava, logits_of, pictures, strengthen
from tiny_llava import TinyLlava
from torch import Tensor, nn

from llava_steering_plugin import AdapterPool, attach, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.errors import AdapterError, BaseMismatch
from llava_steering_plugin.export import tensor_names
from llava_steering_plugin.export.exporting import export
from llava_steering_plugin.hooks.families import Placeholder, family_of
from llava_steering_plugin.modes.mores import MoReS

IDS = torch.tensor([[1, 300, -200, 400, 500]])


@pytest.fixture(scope="module")
def model(tiny: TinyLlava) -> Any:
    return load_llava(tiny.llava).requires_grad_(False)


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """An adapter of transformers' own class, as its file looks, with a projector of its own."""
    attachment = strengthen(attach(model, MoReS(rank=2, tokens="all")))
    attachment.extras |= {f"model.mm_projector.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")}
    save_adapter(model, tmp_path / "adapter")
    remove_adapter(model)
    described = {"model_type": "llava", "text_config": {}, "image_token_index": 700, "image_seq_length": 16}
    described |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    set_header(tmp_path / "adapter", llava_config=json.dumps(described))
    return tmp_path / "adapter"


def test_names_of_older_versions_of_transformers_are_those_that_export_writes() -> None:
    """Their classes are laid out as 4.37's, which cannot be tuned itself."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(CLIPVisionConfig(**VISION), LlamaConfig(**TEXT), image_token_index=60)
    made = LlavaForConditionalGeneration(config)
    family = Placeholder(made)
    for name, _ in made.named_parameters():
        expected = str(tensor_names.to_llava(name, one_linear=False))
        if expected.startswith(tensor_names.TOWER):
            expected = tensor_names.TOWER_IN_LLAVA + expected
        assert family.canonical(name) == expected
        assert family.local(expected) == name


def test_a_projector_of_one_linear_has_two_names(model: Any) -> None:
    names = "model.mm_projector.weight", "model.mm_projector.0.weight"
    own = model.model.mm_projector
    for projector, expected in ((nn.Linear(64, 64), names[0]), (nn.Sequential(nn.Linear(64, 64)), names[1])):
        model.model.mm_projector = projector
        found = [family_of(model).local(name) for name in names]
        model.model.mm_projector = own
        assert found == [expected, expected]


def test_settings_that_transformers_has_under_other_names_are_no_llavas(model: Any, saved: Path) -> None:
    before = dict(vars(model.config))
    load_adapter(model, saved)
    assert vars(model.config) == before
    remove_adapter(model)
    assert vars(model.config) == before
    pool = AdapterPool(model)
    pool.load("one", saved)
    steered = logits_of(model, IDS, pictures(1), adapter_names="one")
    assert not torch.equal(steered, logits_of(model, IDS, pictures(1)))
    pool.remove()


def test_features_of_another_layer_are_those_of_the_adapters_training(model: Any, saved: Path) -> None:
    change_llava_config(saved, mm_vision_select_layer=-1)
    load_adapter(model, saved)
    assert model.get_vision_tower().select_layer == -1
    remove_adapter(model)
    assert model.get_vision_tower().select_layer == -2


def test_projectors_that_do_not_fit_are_refused_in_one_message(model: Any, saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base.model.mm_projector.0.weight"] = torch.zeros(64, 32)
        tensors["base.model.mm_projector.norm.weight"] = torch.zeros(64)

    change_llava_config(change_tensors(saved, change), projector_hidden_act="linear")
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, saved)
    for text in (
        "mm_projector.0.weight is [64, 32] where the model needs [64, 64]",
        "mm_projector.norm.weight has no place",
        "trained as projector_hidden_act 'linear'; this model's is mm_projector_type 'mlp2x_gelu'",
    ):
        assert text in str(caught.value)


def test_two_linears_trained_over_what_is_one_in_llava_are_refused_with_what_to_do(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_llava_config(saved, projector_hidden_act="linear")
    monkeypatch.setitem(model.model._modules, "mm_projector", nn.Linear(64, 64))
    monkeypatch.setattr(model.config, "mm_projector_type", "linear")
    with pytest.raises(AdapterError, match=r"two linears with nothing between them.*with .*linear_2 frozen"):
        load_adapter(model, saved)


def test_llavas_programs_say_how_to_get_the_base_of_an_adapter_of_transformers(
    tiny: TinyLlava, model: Any, saved: Path, tmp_path: Path
) -> None:
    from llava.model.builder import load_pretrained_model

    exported = export(str(tiny.llava), tmp_path / "hf", logits=False).folder
    attachment = load_adapter(model, saved)
    found = describe(attachment)
    attachment.config = replace(found, base=replace(found.base, name_or_path=str(exported)))
    save_adapter(model, tmp_path / "moved")
    remove_adapter(model)
    name = "llava-v1.5-adapter"
    with pytest.raises(BaseMismatch, match=r"transformers' own class.*--model-base; `llava-steering export"):
        load_pretrained_model(str(tmp_path / "moved"), None, name, device="cpu", device_map="cpu")
    loaded = load_pretrained_model(str(tmp_path / "moved"), str(tiny.llava), name, device="cpu", device_map="cpu")
    assert loaded[1].config.mm_projector_type == "mlp2x_gelu"
