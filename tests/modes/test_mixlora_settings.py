"""MixLoRA's settings: defaults, parameter counts, errors, and the choice of linears (`modes/mixlora_targets.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llava_steering_plugin import attach
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes.base import DecoderShape, LayerShape
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear

GOLDEN = Path(__file__).parents[1] / "golden"


def decoder(layers: int = 2) -> DecoderShape:
    linears = {"self_attn.q_proj": (8, 8), "self_attn.v_proj": (8, 4), "mlp.down_proj": (16, 8)}
    names = [f"layers.{number}" for number in range(layers)]
    shapes = [LayerShape(name, {f"{name}.{path}": size for path, size in linears.items()}) for name in names]
    return DecoderShape(8, tuple(shapes))


def test_targets_and_start_layer_choose_the_linears() -> None:
    assert len(MixLoRA().build(decoder())) == 6
    chosen = MixLoRA(targets="q_proj, down_proj", start_layer=1).build(decoder())
    assert list(chosen) == ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
    routed_linear = chosen["layers.1.mlp.down_proj"]
    assert isinstance(routed_linear, RoutedLinear)
    assert (routed_linear.routed_a.shape, routed_linear.routed_b.shape) == ((16, 16), (16, 8))


def test_defaults_are_the_papers_and_the_scale_is_alpha_over_rank() -> None:
    mode = MixLoRA()
    assert (mode.factors, mode.rank, mode.scale, mode.conditional, mode.ifs_weight) == (16, 4, 32 / 4, True, 1)
    assert (mode.pooling, mode.router_learns, mode.noise, mode.dropout) == ("prompt", True, 0, 0)
    assert MixLoRA(factors=8, rank=2).scale == 16 / 2
    assert MixLoRA(factors=8, rank=2, alpha=3.0).scale == 1.5
    released = MixLoRA(variant="released")
    assert (released.pooling, released.router_learns) == ("sequence", False)


def test_routers_that_learn_are_balanced_unless_somebody_says_otherwise() -> None:
    assert MixLoRA().balance_weight == 0.05
    assert MixLoRA(balance=0.0).balance_weight == 0.0
    assert MixLoRA(balance=0.3).balance_weight == 0.3
    for frozen in (MixLoRA(variant="released"), MixLoRA(router_grad="none")):
        assert frozen.balance_weight == 0.0 and not frozen.problems(decoder())
    built = {settings: MixLoRA(balance=settings).build(decoder()) for settings in (None, 0.0)}
    assert {module.balance for module in built[None].values()} == {0.05 / 12}
    assert {module.balance for module in built[0.0].values()} == {0.0}


@pytest.mark.parametrize(("settings", "count"), [({}, 149_291_008), ({"factors": 8, "rank": 2}, 56_426_496)])
def test_on_llava_1_5_7b_it_has_the_parameters_that_the_readme_says(settings: dict[str, Any], count: int) -> None:
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))
    sizes = attention | {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
    layers = tuple(LayerShape(f"{n}", {f"{n}.{name}": size for name, size in sizes.items()}) for n in range(32))
    with torch.device("meta"):
        modules = MixLoRA(**settings).build(DecoderShape(4096, layers))
    assert sum(parameter.numel() for module in modules.values() for parameter in module.parameters()) == count
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"{count:,}" in readme


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 5, "factors": 4}, "mixlora_rank is 5; it must be from 1 to mixlora_factors, 4"),
        ({"factors": 0}, "mixlora_factors is 0; it must be at least 1"),
        ({"alpha": 0.0}, "mixlora_alpha is 0.0"),
        ({"targets": "q_proj,k_prj"}, "is called k_prj; there are down_proj, q_proj, v_proj"),
        ({"targets": " , "}, "mixlora_targets: it is empty"),
        ({"start_layer": 2}, "the last of the model's layers is 1"),
        ({"start_layer": -1}, "mixlora_start_layer is -1"),
        ({"routing": "token"}, "choose one of prompt, sequence"),
        ({"variant": "mine"}, "choose one of paper, released"),
        ({"variant": "released", "routing": "prompt"}, "mixlora_routing prompt contradicts mixlora_variant released"),
        ({"variant": "released", "router_grad": "straight_through"}, "contradicts mixlora_variant released"),
        ({"balance": 0.1, "router_grad": "none"}, "the routers are frozen"),
        ({"noise": -1.0}, "mixlora_noise is -1.0"),
        ({"ifs_weight": float("nan")}, "mixlora_ifs_weight is nan"),
        ({"dropout": 1.0}, "mixlora_dropout is 1.0"),
    ],
)
def test_every_bad_setting_has_its_message(settings: dict[str, Any], message: str) -> None:
    problems = MixLoRA(**settings).problems(decoder())
    assert len(problems) == 1
    assert message in problems[0]


def test_all_bad_settings_are_named_at_once() -> None:
    model = LlamaForCausalLM.from_pretrained(GOLDEN / "mixlora_base")
    with pytest.raises(ArgumentsError) as refused:
        attach(model, "mixlora", rank=9, factors=4, targets="lm_head", dropout=2.0)
    for part in ("mixlora_rank", "mixlora_dropout", "called lm_head"):
        assert part in str(refused.value)
