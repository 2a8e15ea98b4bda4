"""An adapter comes back from its folder to the bit, with all parameters.

Holds for `adapters/attachment.py` and `adapters/parameters.py`.
"""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from steered import PROMPT, contents, ids_of, load_llava, logits_of, pictures, strengthen
from tiny_llava import HIDDEN, LAYERS, TinyLlava
from torch import Tensor

from llava_steering_plugin import attach, load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]


def answer(model: Any) -> Tensor:
    return logits_of(model, ids_of(PROMPT), pictures(1))


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# There and back


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 3, "tokens": "f4+l5", "layers": "every:2"}, {"modality": "vis+text", "dropout": 0.25}]
)
def test_an_adapter_comes_back_to_the_bit(
    model: Any, steered: Steered, tmp_path: Path, settings: dict[str, object]
) -> None:
    attachment = steered(**settings)
    tensors = {name: value.detach().clone() for name, value in attachment.parameters().items()}
    steers, mode = answer(model), attachment.mode
    save_adapter(model, tmp_path)
    remove(model)
    again = load_adapter(model, tmp_path)
    assert again.mode == mode
    assert {name: value.dtype for name, value in again.parameters().items()} == dict.fromkeys(tensors, torch.float32)
    assert all(torch.equal(value, tensors[name]) for name, value in again.parameters().items())
    assert torch.equal(answer(model), steers)
    first, stored = contents(tmp_path), read(tmp_path)
    save_adapter(model, tmp_path)
    second, again_stored = contents(tmp_path), read(tmp_path)
    assert again_stored.config == stored.config
    assert again_stored.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(value, stored.tensors[name]) for name, value in again_stored.tensors.items())
    # safetensors writes its metadata in any order.
    del first[WEIGHTS], second[WEIGHTS]
    assert first == second


def test_upstreams_loader_gives_the_same_model(model: Any, tiny: TinyLlava, saved: Path) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(saved))
    _, loaded, _, _ = load_pretrained_model(str(saved), str(tiny.llava), name, device="cpu")
    frozen = answer(model)
    load_adapter(model, saved)
    expected = answer(model)
    # Upstream loads in half precision.
    torch.testing.assert_close(answer(loaded.float()), expected, atol=0.02, rtol=0.02)
    assert (frozen - expected).abs().max() > 0.2


def test_removing_gives_the_model_back_to_the_bit(model: Any, frozen: Any, steered: Steered) -> None:
    before, names = state(model), set(model.__dict__)
    hooks = count_hooks(model)
    attachment = steered()
    assert model.state_dict().keys() != before.keys()
    assert not torch.equal(answer(model), answer(frozen))
    attachment.remove()
    assert_same_state(model, before)
    assert set(model.__dict__) == names
    assert count_hooks(model) == hooks
    assert torch.equal(answer(model), answer(frozen))
    with pytest.raises(SteeringError, match="carries no adapter"):
        remove(model)


def count_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_second_adapter_and_a_copy_are_refused(model: Any, steered: Steered, saved: Path) -> None:
    steered()
    steers = answer(model)
    for second in (lambda: attach(model, "mores"), lambda: load_adapter(model, saved)):
        with pytest.raises(SteeringError, match="carries an adapter already"):
            second()
    with pytest.raises(SteeringError, match="cannot be copied"):
        copy.deepcopy(model)
    assert torch.equal(answer(model), steers)
    remove(model)
    copy.deepcopy(model)


def test_a_methods_wrapper_put_over_ours_survives_removal(model: Any, frozen: Any, steered: Steered) -> None:
    calls = []
    attachment = steered()
    shadow = model.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return shadow(*args, **kwargs)

    model.forward = wrapper
    attachment.remove()
    assert model.forward is wrapper
    assert torch.equal(answer(model), answer(frozen))
    assert calls
    del model.forward


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnk": 1, "tokns": "all"}, "no rnk, only rank, tokens"),
        ({"rank": "1"}, "rank is '1' where int is expected"),
        ({"tokens": 9, "dropout": None}, "tokens is 9 where str"),
    ],
)
def test_settings_that_a_mode_cannot_take_are_all_named(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentsError, match=message) as error:
        attach(model, "mores", **settings)
    assert str(error.value).count("\n  - ") == len(settings)


# What is in the folder


def test_the_folder_holds_both_configs_twice_and_nothing_to_unpickle(model: Any, saved: Path) -> None:
    assert sorted(contents(saved)) == [
        "README.md",
        "adapter_model.safetensors",
        "config.json",
        "llava_steering_config.json",
    ]
    described = json.loads((saved / "llava_steering_config.json").read_text())
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["llava_steering"]) == described
        assert file.metadata()["llava_config"] == (saved / "config.json").read_text()
        names = set(file.keys())
    assert described["peft_type"] == "LLAVA_MORES"
    assert described["base_model_name_or_path"] == model.config._name_or_path
    assert described["settings"] == MoReS(rank=2, tokens="all").settings()
    base = {"model_type": "llava_llama", "hidden_size": HIDDEN, "num_layers": LAYERS, "vocab_size": 700}
    assert described["base"] == base
    parts = ("steer_basis", "steer_shift", "steer_offset")
    modules = {f"adapter.layers.{layer}.vis.{part}" for layer in range(LAYERS) for part in parts}
    assert names == modules | {"fingerprint.ids", "fingerprint.rows"}
    assert sum(len(data) for data in contents(saved).values()) < 40_000
    modes = {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()}
    assert len(modes) == 1, "whoever may read one file may read all"


def test_config_json_is_llavas_without_the_quantisation(model: Any, steered: Steered, tmp_path: Path) -> None:
    steered()
    model.config.quantization_config = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "llava_llama"
    assert config["mm_vision_tower"] == model.config.mm_vision_tower
    assert model.config.quantization_config["load_in_4bit"], "the model's own config is left alone"


def test_the_card_says_what_it_is_and_how_to_load_it(model: Any, saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "python -m llava.serve.cli --model-path" in card
    assert f"adapter for {model.config._name_or_path}\n" in card
    assert f"{LAYERS * (2 * HIDDEN * 2 + 2):,} parameters of tuning mode `mores`" in card
    assert "| tokens | `all` |" in card


def test_other_files_in_the_folder_stay(model: Any, steered: Steered, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    steered()
    save_adapter(model, tmp_path)
    assert (tmp_path / "trainer_state.json").read_text() == "{}"


# What the base cannot reproduce


def test_a_trained_projector_travels_with_the_adapter(model: Any, frozen: Any, tiny: TinyLlava, tmp_path: Path) -> None:
    own = load_llava(tiny.llava)
    attachment = strengthen(attach(own, MoReS(tokens="all")))
    projector = {name for name, _ in own.named_parameters() if "mm_projector" in name}
    with torch.no_grad():
        for name in projector:
            own.get_parameter(name).mul_(1.5)
    attachment.extras |= projector
    save_adapter(own, tmp_path)
    assert "It also holds 4 tensors" in (tmp_path / "README.md").read_text()
    before = {name: model.get_parameter(name).clone() for name in projector}
    loaded = load_adapter(model, tmp_path)
    assert loaded.extras == projector
    assert torch.equal(answer(model), answer(own))
    loaded.remove()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert torch.equal(answer(model), answer(frozen))
