"""Gradients at the input of a linear that MixLoRA works on are those of the formula written out, however asked for.

Grad-CAM, attribution and losses on features read them through hooks, `torch.autograd.grad` and `retain_grad`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from input_gradients import HOSTS, WAYS, Gradients, Watch, by_grad, forward, own, setting
from routed import LONG, adapted, batch, small_llama
from steered import away_from_identity
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_steering_plugin import AdapterPool, attach, remove, save_adapter, token_map
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.hosts import hang
from llava_steering_plugin.hooks.scope import Scope, entered
from llava_steering_plugin.modes.base import ForwardPass, default_dtype
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """In float64, in which two ways to compute one number agree; and with an attention that has a second derivative."""
    small = small_llama()
    small.config._attn_implementation = "eager"
    model = LlamaForCausalLM(small.config).double().eval()
    model.load_state_dict(small.state_dict())
    return model


def assert_alike(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        exact = 2e-5 if ".router_" in name else 3e-6  # parameters are in float32, and routers compute in it
        torch.testing.assert_close(
            found[name], gradient, rtol=exact, atol=exact * scale, msg=lambda text, n=name: n + text
        )


@pytest.mark.parametrize("before", [False, True], ids=["hooks after", "hooks before"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_those_of_the_formula_written_out(
    base: LlamaForCausalLM, way: Callable[..., Gradients], train: bool, before: bool
) -> None:
    found = []
    for written_out in (False, True):
        with setting(base, train=train, before=before, written_out=written_out) as (attachment, watch):
            found.append(way(base, attachment, watch))
    assert_alike(*found)
    if way is by_grad:
        with setting(base, train=train, before=before, written_out=True) as (attachment, watch):
            with torch.no_grad():
                for module in attachment.modules.values():
                    module.routed_b.zero_()
            without = by_grad(base, attachment, watch)
        differ = [
            float((without[name] - found[0][name]).norm() / found[0][name].norm()) for name in found[0] if "in " in name
        ]
        assert min(differ) > 0.1, "an adapter without a part of the gradient would show nothing"


def note(output: Tensor, kept: Gradients) -> None:
    """Let the input of the first layer note its gradient; it is that of embeddings which are frozen."""
    output.requires_grad_(True).register_hook(lambda gradient: kept.update(embedded=gradient.clone()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_gradients_of_the_formula_too(
    base: LlamaForCausalLM, reentrant: bool, dropout: float
) -> None:
    found = []
    for written_out in (False, True):
        with setting(base, train=True, before=False, written_out=written_out, dropout=dropout) as (attachment, _):
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            gradients: Gradients = {}
            handle = base.model.layers[1].register_full_backward_hook(
                lambda module, inputs, outputs, kept=gradients: kept.update(out=outputs[0].clone())
            )
            embedded = base.model.embed_tokens.register_forward_hook(
                lambda module, args, output, kept=gradients: note(output, kept)
            )
            forward(base).backward()
            handle.remove(), embedded.remove()
            base.gradient_checkpointing_disable()
            found.append(gradients | own(attachment))
    assert "embedded" in found[0]
    assert_alike(*found)


def test_threads_that_ask_at_once_get_their_own_gradients(base: LlamaForCausalLM) -> None:
    with setting(base, train=True, before=False, written_out=True) as (attachment, watch):
        expected = by_grad(base, attachment, watch)
    with setting(base, train=True, before=False, written_out=False) as (attachment, watch):
        watch.remove()
        parameters = attachment.trained()
        found: list[Gradients] = []

        def run() -> None:
            for _ in range(4):
                asked = torch.autograd.grad(forward(base), list(parameters.values()))
                found.append(dict(zip(parameters, asked, strict=True)))

        threads = [threading.Thread(target=run) for _ in range(2)]
        with default_dtype(torch.float64):  # it is the process's
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(found) == 8
    for gradients in found:
        assert_alike(gradients, {name: expected[name] for name in gradients})


def test_a_hook_from_before_sees_the_bases_output_and_its_gradient(base: LlamaForCausalLM) -> None:
    for train in (True, False):
        with setting(base, train=train, before=True, written_out=False) as (_, watch):
            loss = forward(base)
            for path in HOSTS:
                host = base.model.get_submodule(path)
                assert torch.equal(watch.outputs[path], nn.functional.linear(watch.inputs[path], host.weight))
                (gradient,) = torch.autograd.grad(loss, watch.outputs[path], retain_graph=True)
                assert bool(gradient.any())


def test_a_hook_from_before_a_pool_sees_the_bases_output_too(base: LlamaForCausalLM, tmp_path: Any) -> None:
    with adapted(base):
        save_adapter(base, tmp_path / "it")
    watch = Watch(base)
    pool = AdapterPool(base)
    pool.load("it", tmp_path / "it")
    ids, attention = batch(LONG, LONG[::-1])
    try:
        for names in ("it", ["it", "__base__"]):
            with torch.no_grad(), token_map(torch.zeros_like(ids), attention), default_dtype(torch.float64):
                base(ids, attention_mask=attention, adapter_names=names)
            for path in HOSTS:
                host = base.model.get_submodule(path)
                assert torch.equal(watch.outputs[path], nn.functional.linear(watch.inputs[path], host.weight))
    finally:
        pool.remove()
        watch.remove()


def test_linears_that_train_beside_the_adapter_get_their_gradients(base: LlamaForCausalLM) -> None:
    found = []
    for written_out in (False, True):
        with setting(base, train=True, before=False, written_out=written_out) as (attachment, _):
            host: Any = base.model.get_submodule(HOSTS[3])
            host.weight.requires_grad_(True)
            forward(base).backward()
            found.append({"weight": host.weight.grad.clone()} | own(attachment))
            host.weight.requires_grad_(False)
    assert_alike(*found)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_linear_in_four_bits_has_the_whole_gradient_at_its_input(train: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    linear = Linear4bit(64, 48, bias=False, compute_dtype=torch.float32)
    linear.weight = Params4bit(torch.randn(48, 64), requires_grad=False, quant_type="nf4")
    linear = linear.to("cpu")
    module = RoutedLinear(64, 48, MixLoRA(factors=4, rank=2))
    away_from_identity(module)
    host = nn.Sequential(linear).train(train)
    inputs = torch.randn(2, 5, 64, requires_grad=True)
    there = torch.ones(2, 5, dtype=torch.bool)
    this_pass = ForwardPass(~there, there, there, False, {})
    hang(host, {"0": module})
    with entered(Scope(this_pass=this_pass)):
        (found,) = torch.autograd.grad(host(inputs).square().sum(), inputs)
    weight = dequantize_4bit(linear.weight, linear.weight.quant_state).reshape(48, 64)
    a, b = module.factors_for(inputs.detach(), this_pass, torch.float32)
    output = inputs @ weight.T + torch.einsum("npi,nri,nro->npo", inputs, a, b)
    (expected,) = torch.autograd.grad(output.square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_one_linear_in_two_layers_is_refused_at_attach_and_in_a_pool(tmp_path: Any) -> None:
    tied = small_llama()
    with adapted(tied):
        save_adapter(tied, tmp_path / "it")
    tied.model.layers[1].mlp.up_proj = tied.model.layers[0].mlp.up_proj
    message = r"several places.*\n  - layers\.0\.mlp\.up_proj and layers\.1\.mlp\.up_proj"
    with pytest.raises(SteeringError, match=message):
        attach(tied, MixLoRA())
    pool = AdapterPool(tied)
    with pytest.raises(SteeringError, match=message):
        pool.load("it", tmp_path / "it")
    pool.remove()
    attach(tied, MixLoRA(targets="q_proj,v_proj"))
    remove(tied)
    attach(tied, "mores")
    remove(tied)
