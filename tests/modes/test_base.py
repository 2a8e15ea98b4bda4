"""The contract of a mode, as other packages rely on it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from llava_steering_plugin.modes import base
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, LayerShape, Mode, no_autocast, setting

MASK = torch.tensor([[True, False]])


def a_pass() -> ForwardPass:
    """A pass with the five arguments that modes of other packages give it."""
    return ForwardPass(MASK, ~MASK, MASK, False, {})


def test_a_pass_is_made_of_five_arguments_and_its_first_name_is_still_known() -> None:
    assert base.Pass is ForwardPass
    this_pass = base.Pass(MASK, ~MASK, MASK, True, {"a": 1})
    assert this_pass.decode and this_pass.kept == {"a": 1} and torch.equal(this_pass.text, ~MASK)


def test_once_computes_a_value_for_the_first_layer_and_hands_it_to_the_others() -> None:
    this_pass, made = a_pass(), []

    def make() -> int:
        made.append(1)
        return 7

    assert [this_pass.once("key", make) for _ in range(3)] == [7, 7, 7] and len(made) == 1
    assert this_pass.once("other", make) == 7 and len(made) == 2
    assert a_pass().once("key", lambda: 8) == 8, "another pass"


def test_the_loss_scale_is_one_until_the_backward_pass_of_the_loss_begins() -> None:
    this_pass, other = a_pass(), a_pass()
    assert this_pass.loss_scale() == 1.0
    loss = torch.tensor(2.0, requires_grad=True)
    loss.register_hook(this_pass.loss_gradient.note)
    (loss * 3).backward()
    assert float(this_pass.loss_scale()) == 3.0 and other.loss_scale() == 1.0


@dataclass(frozen=True)
class Example(Mode):
    name: ClassVar[str] = "example"
    strength: float = setting(0.5, "how strong it is")

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        return {layer.path: nn.Identity() for layer in decoder.layers}


def test_a_setting_is_a_field_with_a_default_and_a_help_text() -> None:
    (strength,) = fields(Example)
    assert (strength.default, strength.metadata["help"]) == (0.5, "how strong it is")
    assert Example().settings() == {"strength": 0.5}
    assert Example(strength=1.0) == Example(1.0) != Example()


def test_a_mode_need_only_build() -> None:
    mode = Example()
    decoder = DecoderShape(8, (LayerShape("layers.0", {}),))
    assert list(mode.build(decoder)) == ["layers.0"]
    assert mode.problems() == mode.problems(decoder) == [] and mode.report({}) == {} and not mode.idle_at_decode
    with pytest.raises(TypeError, match="abstract"):
        Mode()  # type: ignore[abstract]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_off_inside_the_block(device: str) -> None:
    def product() -> Tensor:
        return torch.ones(2, 2) @ torch.ones(2, 2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product().dtype == torch.bfloat16
        with no_autocast(torch.device(device)):
            assert product().dtype == torch.float32
