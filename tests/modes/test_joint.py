"""A joint mode computes both of its parts at once: their hosts, checks and statistics; no host has two modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from joined import LORA, ROUTING, STEERING, CountMode, GainMode
from routed import LONG, SHORT, batch, small_llama
from steered import ByHand
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_steering_plugin import attach, disable_adapter, load_adapter, save_adapter, token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.joint import (
    Joint,
    JointStatistics,
    at_decode,
    joint,
    part_of,
)
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps
from llava_steering_plugin.modes.mores import SteeredLayer
from llava_steering_plugin.modes.peft.layers import TunedLinear
from llava_steering_plugin.modes.peft.mode import Peft

STEP = 1e-3  # of finite differences


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_llama()


@contextmanager
def attached(base: LlamaForCausalLM, mode: Mode, size: float = 0.1) -> Iterator[Attachment]:
    """A model with a mode far from the identity; afterwards as it was."""
    attachment = attach(base, mode)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    try:
        yield attachment
    finally:
        attachment.remove()
        base.eval().zero_grad(set_to_none=True)


def logits(model: LlamaForCausalLM, ids: Tensor, attention: Tensor) -> Tensor:
    with torch.no_grad(), token_map(image(ids), attention):
        found: Tensor = model(ids, attention_mask=attention).logits
    return found


def image(ids: Tensor) -> Tensor:
    """The second and the third of the last four positions, whatever the padding, are an image's."""
    positions = torch.arange(ids.shape[1]) - ids.shape[1]
    return ((positions == -4) | (positions == -3)).expand(ids.shape)


# What it does


def test_a_fresh_one_is_the_identity_and_off_or_removed_it_is_the_base_to_the_bit(base: LlamaForCausalLM) -> None:
    ids, attention = batch(SHORT, LONG)
    names = [name for name, _ in base.named_parameters()]
    frozen = logits(base, ids, attention)
    attachment = attach(base, "mixlora+mores", mores_tokens="all", mixlora_factors=4, mixlora_rank=2)
    assert torch.equal(logits(base, ids, attention), frozen)
    attachment.remove()
    with attached(base, joint(STEERING, ROUTING)):
        assert not torch.allclose(logits(base, ids, attention), frozen, atol=1e-2)
        with disable_adapter(base):
            assert torch.equal(logits(base, ids, attention), frozen)
    assert torch.equal(logits(base, ids, attention), frozen)
    assert [name for name, _ in base.named_parameters()] == names


@pytest.mark.parametrize("other", [ROUTING, LORA], ids=["mixlora", "lora"])
def test_it_computes_the_part_in_the_linears_and_steering_by_hand_on_the_layers(
    base: LlamaForCausalLM, other: Mode
) -> None:
    """With a joint adapter's weights: the other part alone, and MoReS' formula for each token; decode steps too."""
    ids, attention = batch(SHORT, LONG)
    visual = image(ids)
    with attached(base, joint(STEERING, other)) as attachment:
        weights = {name: value.detach().clone() for name, value in attachment.parameters().items()}
        here = logits(base, ids, attention), generated(base, ids, attention)
    with attached(base, STEERING) as steering:
        fill(steering, weights)
        by_hand = ByHand(steering)
        steered = logits(base, ids, attention)
    with attached(base, other) as linears:
        fill(linears, weights)
        tuned = logits(base, ids, attention)
        with by_hand.steering(base, visual):
            there = logits(base, ids, attention), generated(base, ids, attention)
    torch.testing.assert_close(here[0], there[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(here[1], there[1])
    assert not torch.allclose(here[0], steered, atol=1e-2) and not torch.allclose(here[0], tuned, atol=1e-2)


@pytest.mark.parametrize("part", ["steer_", "routed_", "lora_"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_gradients_of_both_parts_are_those_of_finite_differences(
    base: LlamaForCausalLM, part: str, checkpointing: str | None
) -> None:
    # Routers that nothing of this changes: a choice that flips between two losses has no difference.
    fixed = MixLoRA(factors=6, rank=2, alpha=1.0, conditional=False, router_grad="none")
    with attached(base, joint(STEERING, LORA if part == "lora_" else fixed)) as attachment:
        base.train().requires_grad_(False)
        parameters = {name: each for name, each in attachment.trained().items() if part in name}
        assert len(parameters) == {"steer_": 6, "routed_": 28, "lora_": 28}[part]
        for parameter in attachment.trained().values():
            parameter.requires_grad_(True)
        if checkpointing is not None:
            base.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        loss_of(base).backward()
        base.gradient_checkpointing_disable()
        generator = torch.Generator().manual_seed(7)
        directions = {name: torch.randn(each.shape, generator=generator) for name, each in parameters.items()}
        slope = sum(float((each.grad * directions[name]).sum()) for name, each in parameters.items())
        losses = []
        with torch.no_grad():
            for step in (STEP, -2 * STEP):
                for name, each in parameters.items():
                    each += step * directions[name]
                losses.append(float(loss_of(base)))
    assert abs(slope) > 0.05, "it would show nothing"
    assert (losses[0] - losses[1]) / (2 * STEP) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (GainMode(), STEERING, "mores and gain both change the output of layers.0, and only one can"),
        (ROUTING, GainMode("o_proj"), "gain and mixlora both change the output of layers.0.self_attn.o_proj, and only"),
    ],
    ids=["layers", "linears"],
)
def test_two_modes_that_want_one_host_are_refused_with_their_names(
    base: LlamaForCausalLM, one: Mode, other: Mode, said: str
) -> None:
    mode, shape = joint(one, other), find_decoder(base)[1]
    assert mode.problems() == [], "only the model says which hosts there are"
    assert len(mode.problems(shape)) == len(shape.layers)
    assert said in mode.problems(shape)[0]
    with pytest.raises(ArgumentsError, match=said):
        attach(base, mode)
    with pytest.raises(ArgumentsError, match=said):
        mode.build(shape)


def test_a_mode_of_another_package_is_joined_like_our_own(base: LlamaForCausalLM, tmp_path: Path) -> None:
    ids, attention = batch(SHORT, LONG)
    mode = joint(GainMode("o_proj"), STEERING)
    assert (mode.name, type(mode).idle_at_decode) == ("mores+gain", False)
    with attached(base, mode) as attachment:
        assert {part_of(module) for module in attachment.modules.values()} == {"mores", "gain"}
        assert list(at_decode(mode, attachment.modules)) == [f"layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
        assert mode.report(attachment.modules) == {"hosts": 2.0}
        told = [getattr(module, "of_host", None) for module in attachment.modules.values()]
        assert told.count("Linear") == 2 and told.count(None) == 2, "a part is told the hosts of its own modules alone"
        expected = logits(base, ids, attention)
        save_adapter(base, tmp_path)
    # What is not installed here is named as a whole.
    with pytest.raises(AdapterError, match="needs a mode that is not installed: unknown tuning mode 'gain'"):
        load_adapter(base, tmp_path)
    assert not torch.equal(logits(base, ids, attention), expected)


def test_figures_of_the_same_name_get_the_names_of_their_parts(base: LlamaForCausalLM) -> None:
    mode = joint(CountMode(), GainMode("q_proj"))
    modules = mode.build(find_decoder(base)[1])
    assert mode.report(modules) == {"hosts": 2.0, "gain_hosts": 2.0}


# What is asked of every mode


def test_whatever_is_asked_of_a_mode_is_asked_of_the_parts() -> None:
    asked = {
        name for name, value in vars(Mode).items() if not name.startswith("_") and not isinstance(value, str | bool)
    }
    assert asked <= vars(Joint).keys(), "a joint mode has to ask its parts too: add it to `Joint`"


def test_steering_and_dora_begin_as_the_identity_and_load_as_they_were_saved(
    base: LlamaForCausalLM, tmp_path: Path
) -> None:
    """DoRA's first magnitudes are those of its linears: a mode is told its hosts, as a part too."""
    ids, attention = batch(SHORT, LONG)
    frozen = logits(base, ids, attention)
    mode = joint(Peft("lora", '{"use_dora": true}'), STEERING)
    attachment = attach(base, mode)
    torch.testing.assert_close(logits(base, ids, attention), frozen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    expected = logits(base, ids, attention)
    save_adapter(base, tmp_path)
    attachment.remove()
    assert not torch.allclose(expected, frozen, atol=1e-2)
    assert not (tmp_path / "adapter_config.json").exists(), "PEFT would load half of it"
    loaded = load_adapter(base, tmp_path)
    try:
        assert loaded.mode == mode
        assert torch.equal(logits(base, ids, attention), expected)
    finally:
        loaded.remove()


def test_factors_and_lora_go_together_on_different_linears_alone(base: LlamaForCausalLM) -> None:
    shape = find_decoder(base)[1]
    apart = joint(MixLoRA(targets="q_proj"), Peft("lora", '{"target_modules": ["v_proj"]}'))
    assert apart.name == "mixlora+peft" and apart.problems(shape) == []
    (problem, *_) = joint(MixLoRA(targets="q_proj"), LORA).problems(shape)
    assert "mixlora and peft both change the output of layers.0.self_attn.q_proj" in problem


def test_it_is_saved_and_loaded_with_both_parts(base: LlamaForCausalLM, tmp_path: Path) -> None:
    ids, attention = batch(SHORT, LONG)
    mode = joint(STEERING, ROUTING)
    with attached(base, mode) as attachment:
        expected, text = logits(base, ids, attention), generated(base, ids, attention)
        summary = attachment.summary()
        save_adapter(base, tmp_path)
    assert list(summary.parts) == ["mores", "mixlora"] and sum(summary.parts.values()) == summary.mode
    assert summary.parts["mores"] == 2 * (2 * 32 * 2 + 2)
    card = (tmp_path / "README.md").read_text()
    assert "- mores+mixlora\n- mores\n- mixlora\n" in card and "| mixlora_balance | `0.5` |" in card
    loaded = load_adapter(base, tmp_path)
    try:
        assert loaded.mode == mode and loaded.config is not None and loaded.config.mode == "mores+mixlora"
        assert torch.equal(logits(base, ids, attention), expected)
        assert torch.equal(generated(base, ids, attention), text)
    finally:
        loaded.remove()


@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        ("layers.0.vis.steer_basis", 0.0, "layers.0.vis.steer_basis: its 2 rows span no subspace"),
        ("layers.1.mlp.up_proj.routed_a", 1e15, "layers.1.mlp.up_proj.routed_a: its products .* overflow"),
    ],
)
def test_values_that_do_not_compute_in_either_part_are_refused(
    base: LlamaForCausalLM, tmp_path: Path, tensor: str, value: float, said: str
) -> None:
    with attached(base, joint(STEERING, ROUTING)) as attachment:
        with torch.no_grad():
            attachment.parameters()[tensor].fill_(value)
        save_adapter(base, tmp_path)
    with pytest.raises(AdapterError, match=said):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(("other", "kind"), [(ROUTING, RoutedLinear), (LORA, TunedLinear)], ids=["mixlora", "lora"])
def test_only_the_linears_are_called_at_decode_steps(base: LlamaForCausalLM, other: Mode, kind: type) -> None:
    mode = joint(STEERING, other)
    modules = mode.build(find_decoder(base)[1])
    assert {type(module) for module in modules.values()} == {SteeredLayer, kind}
    assert {type(module) for module in at_decode(mode, modules).values()} == {kind}
    assert at_decode(STEERING, modules) == {} and at_decode(ROUTING, modules) is modules


def test_the_balance_of_the_factors_is_led_and_its_state_stands_under_the_name_of_its_part(
    base: LlamaForCausalLM,
) -> None:
    mode = joint(STEERING, ROUTING)
    shape = find_decoder(base)[1]
    statistics = mode.statistics(mode.build(shape))
    assert isinstance(statistics, JointStatistics)
    (of_factors,) = statistics.parts.values()
    assert isinstance(of_factors, BalanceOverSteps)
    statistics.begin(2)
    summed: list[Tensor] = []
    statistics.end_step(lambda tensor: summed.append(tensor) or tensor)  # type: ignore[func-returns-value]
    assert len(summed) == 1
    state = statistics.state()
    assert state == {"mixlora": of_factors.state()}
    statistics.load(state)
    statistics.load({})
    assert statistics.parts == {} and statistics.state() == {}, "a checkpoint without them goes on without them"
    assert joint(STEERING, GainMode("q_proj")).statistics({}) is None


def fill(attachment: Attachment, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in attachment.parameters().items():
            parameter.copy_(weights[name])


def generated(model: LlamaForCausalLM, ids: Tensor, attention: Tensor) -> Tensor:
    with token_map(image(ids), attention):
        output: Tensor = model.generate(
            ids, attention_mask=attention, max_new_tokens=5, pad_token_id=0, do_sample=False
        )
    return output


def loss_of(model: LlamaForCausalLM) -> Tensor:
    ids, attention = batch(SHORT + LONG, LONG, side="right")
    labels = ids.masked_fill(~attention.bool(), -100)
    labels[:, :6] = -100
    visual = torch.zeros_like(attention, dtype=torch.bool)
    visual[:, 2:5] = True
    with token_map(visual, attention, (labels != -100).cumsum(1) == 0):
        loss: Tensor = model(ids, attention_mask=attention, labels=labels).loss
    return loss
