"""Adapters are built and computed in float32 whatever torch's default dtype is: a failed load may have left another.

Covers `modes/precision.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from routed import LONG, batch, small_llama
from steered import strengthen
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_steering_plugin import AdapterPool, attach, load_adapter, remove_adapter, save_adapter, token_map
from llava_steering_plugin.adapters.fit.fingerprint import fingerprint_rows
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, Mode, default_dtype
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mixlora_balance import Tally, shares
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.modes.precision import autocast_is_on

MODES = [MoReS(rank=2, tokens="all", modality="vis+text"), MixLoRA(factors=8, rank=2, balance=0.3)]
OTHERS = [torch.float16, torch.bfloat16, torch.float64]
# Without padding: transformers makes its mask in the default dtype, and fails where that is not the model's.
IDS, _ = batch(LONG, LONG[::-1])
VISUAL = ((torch.arange(IDS.shape[1]) > 2) & (torch.arange(IDS.shape[1]) < 5)).expand_as(IDS)
PROMPT = (torch.arange(IDS.shape[1]) < 7).expand_as(IDS)


@pytest.fixture(params=OTHERS, ids=str)
def other(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def float32_llama() -> LlamaForCausalLM:
    with default_dtype(torch.float32):
        return small_llama()


def trained(model: LlamaForCausalLM, mode: Mode) -> tuple[list[Tensor], dict[str, Tensor], dict[str, float]]:
    """Attach and train for two steps; return the losses, the parameters and what is logged."""
    torch.manual_seed(1)
    attachment = attach(model.requires_grad_(False), mode)
    with default_dtype(torch.float32):
        strengthen(attachment)
    assert all(parameter.dtype == torch.float32 for parameter in attachment.parameters().values())
    optimizer = torch.optim.AdamW([*attachment.trained().values()], lr=1e-2)
    model.train()
    losses = []
    for _ in range(2):
        with token_map(VISUAL, prompt=PROMPT):
            loss = model(IDS, labels=IDS.masked_fill(PROMPT, -100)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    values = {name: parameter.detach().clone() for name, parameter in attachment.parameters().items()}
    return losses, values, mode.report(attachment.modules)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_training_saving_loading_and_the_pool_are_the_same_to_the_bit(
    mode: Mode, other: torch.dtype, tmp_path: Path
) -> None:
    def everything(folder: Path) -> list[Any]:
        model = float32_llama()
        losses, values, figures = trained(model, mode)
        save_adapter(model, folder)
        remove_adapter(model)
        model.eval()
        answers = []
        load_adapter(model, folder)
        with torch.no_grad(), token_map(VISUAL):
            answers.append(model(IDS).logits)
        remove_adapter(model)
        pool = AdapterPool(model)
        pool.load("one", folder)
        with torch.no_grad(), token_map(VISUAL):
            answers.append(model(IDS, adapter_names=["one", "__base__"]).logits)
        pool.remove()
        return [*losses, *values.values(), *answers, figures]

    expected = everything(tmp_path / "expected")
    with default_dtype(other):
        found = everything(tmp_path / "found")
        assert torch.get_default_dtype() == other
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


def test_a_fresh_adapter_has_the_values_that_it_has_under_float32(other: torch.dtype) -> None:
    for mode in MODES:
        found = []
        for dtype in (torch.float32, other):
            model = float32_llama()
            torch.manual_seed(1)
            with default_dtype(dtype):
                found.append({name: each.detach() for name, each in attach(model, mode).parameters().items()})
        assert all(
            value.dtype == torch.float32 and torch.equal(value, found[0][name]) for name, value in found[1].items()
        )


class Scaled(nn.Module):
    """Builds its parameter as most code does: in the default dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Linear(width, width, bias=False).weight

    def forward(self, output: Any, inputs: Tensor, this_pass: ForwardPass) -> Any:
        return output


@dataclasses.dataclass(frozen=True)
class ThirdParty(Mode):
    name: ClassVar[str] = "third"

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        return {decoder.layers[0].path: Scaled(decoder.hidden_size)}


def test_a_mode_of_another_package_is_built_under_float32_too(other: torch.dtype) -> None:
    model = float32_llama()
    with default_dtype(other):
        (parameter,) = attach(model, ThirdParty()).parameters().values()
        assert torch.get_default_dtype() == other
    assert parameter.dtype == torch.float32


def test_default_dtype_puts_back_what_a_failing_block_changed() -> None:
    before = torch.get_default_dtype()
    for dtype in (None, torch.float64):
        with pytest.raises(ValueError, match="inside"), default_dtype(dtype):
            assert torch.get_default_dtype() == (dtype or before)
            torch.set_default_dtype(torch.float16)
            raise ValueError("inside")
        assert torch.get_default_dtype() == before


def test_rows_and_frequencies_are_counted_beyond_what_half_precision_holds(other: torch.dtype) -> None:
    rows = fingerprint_rows(32_000)
    chosen = torch.zeros(1, 5001, dtype=torch.long)
    chosen[0, 0] = 1
    with default_dtype(other):
        assert torch.equal(fingerprint_rows(32_000), rows) and rows[-1] == 31_999
        found = shares([Tally(2)], chosen, counted=False)
    assert torch.equal(found, torch.tensor([[5000 / 5001, 1 / 5001]]))


def test_where_an_older_torch_cannot_tell_autocast_counts_as_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_torch_2_1() -> bool:
        return False

    assert autocast_is_on("meta") and not autocast_is_on("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_is_on("cpu")
    monkeypatch.setattr(torch, "is_autocast_enabled", of_torch_2_1)
    assert [autocast_is_on(name) for name in ("cpu", "cuda", "xpu")] == [False, False, True]
