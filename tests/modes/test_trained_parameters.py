"""Whatever settings a mode accepts, every parameter that it trains gets a gradient that is not zero."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach, load_adapter, save_adapter, token_map
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

ROWS, LENGTH = 3, 12
PROMPT = torch.arange(LENGTH).expand(ROWS, LENGTH) < 8
VISUAL = (torch.arange(LENGTH) > 1) & (torch.arange(LENGTH) < 6) & (torch.arange(ROWS)[:, None] < 2)


def tiny_llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def without_gradient(model: LlamaForCausalLM, mode: Mode, steps: int = 3) -> set[str]:
    """Train for some steps, and return the trained parameters whose gradients were all zero."""
    model.requires_grad_(False)
    attachment = attach(model, mode)
    waiting = attachment.trained()
    assert waiting
    optimizer = torch.optim.AdamW([*waiting.values()], lr=1e-2)
    try:
        for step in range(steps):
            torch.manual_seed(step)
            ids = torch.randint(0, 32, (ROWS, LENGTH))
            with token_map(VISUAL, prompt=PROMPT):
                model(input_ids=ids, labels=ids.masked_fill(PROMPT, -100)).loss.backward()
            waiting = {name: each for name, each in waiting.items() if each.grad is None or not each.grad.any()}
            optimizer.step()
            optimizer.zero_grad()
    finally:
        attachment.remove()
    return set(waiting)


def mixlora_grid() -> Iterator[MixLoRA]:
    counts = [(1, 1), (2, 1), (4, 2), (4, 4)]
    selections = [(False, 1.0), *((True, weight) for weight in (0.0, 1e-9, 0.5, 1e9))]
    kinds = [("paper", grad, routing) for grad in (None, "none") for routing in (None, "sequence")]
    kinds += [("released", None, None)]
    rests = itertools.cycle([(0.0, 0.0, "all"), (0.5, 0.3, "q_proj,down_proj"), (0.0, 0.3, "all")])
    for (factors, rank), (conditional, weight), (variant, grad, routing), balance in itertools.product(
        counts, selections, kinds, (None, 0.0)
    ):
        rest = next(rests)
        yield MixLoRA(
            factors=factors,
            rank=rank,
            conditional=conditional,
            ifs_weight=weight,
            variant=variant,
            router_grad=grad,
            routing=routing,
            balance=balance,
            noise=rest[0],
            dropout=rest[1],
            targets=rest[2],
        )


def test_every_trained_parameter_of_mixlora_learns_in_the_whole_grid_of_settings() -> None:
    model = tiny_llama(1)
    accepted = [mode for mode in mixlora_grid() if not mode.problems()]
    assert len(accepted) == 200
    for mode in accepted:
        assert not (idle := without_gradient(model, mode)), f"{mode}: {sorted(idle)}"


def test_every_trained_parameter_of_mores_learns_in_the_whole_grid_of_settings() -> None:
    model = tiny_llama(2)
    grid = itertools.product(
        (1, 2, 8), ("all", "1%", "f1", "f1+l2", "f1,f2,all"), ("vis", "text", "vis+text"), ("all", "0"), (0.0, 0.3)
    )
    for rank, tokens, modality, layers, dropout in grid:
        mode = MoReS(rank=rank, tokens=tokens, modality=modality, layers=layers, dropout=dropout)
        assert not mode.problems()
        idle = {name for name in without_gradient(model, mode) if not name.startswith("layers.1.")}
        assert not idle, f"{mode}: {sorted(idle)}, beside the last layer, from which nothing reaches another token"


CANNOT_LEARN = [
    (MixLoRA(factors=1, rank=1), {"router_a", "router_b", "router_ab"}),
    (MixLoRA(factors=1, rank=1, balance=0.1), {"router_a", "router_b", "router_ab"}),
    (MixLoRA(factors=1, rank=1, conditional=False), {"router_a", "router_b"}),
    (MixLoRA(factors=4, rank=2, ifs_weight=0.0), {"router_ab"}),
    (MixLoRA(factors=4, rank=2, ifs_weight=1e30), {"router_b"}),
]


def in_order(value: MixLoRA | set[str]) -> str:
    """Return the name of a case, which must be the same in every process that runs tests."""
    return " ".join(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(("mode", "fixed"), CANNOT_LEARN, ids=in_order)
def test_routers_that_cannot_change_a_choice_are_saved_and_not_trained(
    mode: MixLoRA, fixed: set[str], tmp_path: Path
) -> None:
    model = tiny_llama(1)
    attachment = attach(model, mode)
    names = {name.rpartition(".")[2] for name in attachment.parameters().keys() - attachment.trained().keys()}
    assert names == fixed
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.normal_()
    values = {name: parameter.clone() for name, parameter in attachment.parameters().items()}
    save_adapter(model, tmp_path)
    attachment.remove()
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {f"adapter.{name}" for name in values} <= set(file.keys()), "as earlier versions saved them"
    loaded = load_adapter(model, tmp_path)
    assert loaded.mode == mode
    assert all(torch.equal(parameter, values[name]) for name, parameter in loaded.parameters().items())
    assert {name.rpartition(".")[2] for name in loaded.parameters().keys() - loaded.trained().keys()} == fixed
    loaded.remove()


@pytest.mark.parametrize("name", ["ifs_weight", "noise", "balance"])
def test_a_weight_that_float32_does_not_hold_is_refused(name: str) -> None:
    mode = MixLoRA(factors=4, rank=2)
    assert not dataclasses.replace(mode, **{name: 1e30}).problems()
    for value in (1e39, float("inf"), float("nan"), -1.0):
        (problem,) = dataclasses.replace(mode, **{name: value}).problems()
        assert f"mixlora_{name}" in problem
