"""One routed linear: the authors' numbers, the formula written out naively, gradients, dtypes, hosts.

The update and its backward pass are `modes/mixlora_factors.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from routed import SMALL, a_pass, everything, routed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from llava_steering_plugin import attach, token_map
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.hosts import hang, unhang
from llava_steering_plugin.hooks.scope import Scope, entered
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear
from llava_steering_plugin.modes.mixlora_routing import best

GOLDEN = Path(__file__).parents[1] / "golden"


def load_released(module: RoutedLinear, tensors: dict[str, Tensor]) -> None:
    """From the authors' names, as the docstring of RoutedLinear maps them."""
    factors, width = module.routed_a.shape
    conditional = "cmoa_loarB_extra_selector.loraB_selector.weight" in tensors
    router_b = "cmoa_loarB_extra_selector" if conditional else "cmoa_selector"
    with torch.no_grad():
        module.routed_a.copy_(torch.cat([tensors[f"lora_A.default.{number}"] for number in range(factors)]))
        module.routed_b.copy_(torch.cat([tensors[f"lora_B.default.{number}"] for number in range(factors)]))
        module.router_a.copy_(tensors["cmoa_selector.loraA_selector.weight"])
        module.router_b.copy_(tensors[f"{router_b}.loraB_selector.weight"])
        if conditional:
            given_a = tensors["cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight"]
            module.router_ab.copy_(given_a.view(factors, module.mode.rank, width).transpose(0, 1))


# The authors' code, run on random weights


@pytest.mark.parametrize("name", ["mixlora_layer_0", "mixlora_layer_1"])
def test_the_released_codes_layers_give_its_outputs_and_choose_exactly_its_factors(name: str) -> None:
    about = json.loads((GOLDEN / "mixlora.json").read_text())[name]
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    conditional = "lora_a_param" in about["cond"]
    mode = MixLoRA(about["E"], about["r"], about["alpha"], conditional=conditional, variant="released")
    module = RoutedLinear(about["i"], about["o"], mode).eval()
    load_released(module, tensors)
    step = everything(about["b"], about["s"])
    with torch.no_grad():
        output = module(tensors["__x"] @ tensors["weight"].T, tensors["__x"], step)
    torch.testing.assert_close(output, tensors["__y"], atol=1e-5, rtol=0)
    assert torch.equal(step.kept[module].a, tensors["__A_idx"])
    assert torch.equal(step.kept[module].b, tensors["__B_idx"])


def test_the_released_codes_checkpoint_gives_its_logits_through_an_attached_model() -> None:
    about = json.loads((GOLDEN / "mixlora.json").read_text())["mixlora_released"]
    golden = load_file(GOLDEN / "mixlora_released_io.safetensors")
    weights = torch.load(GOLDEN / "mixlora_released" / "pytorch_model.bin", weights_only=True)
    model = LlamaForCausalLM.from_pretrained(GOLDEN / "mixlora_base", attn_implementation="eager").eval()
    attachment = attach(model, MixLoRA(about["E"], about["r"], about["alpha"], variant="released"))
    for path, module in attachment.modules.items():
        prefix = f"base_model.model.model.{path}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        assert isinstance(module, RoutedLinear)
        load_released(module, own)
    embeds = golden["inputs_embeds"]
    with torch.no_grad(), token_map(torch.zeros(embeds.shape[:2], dtype=torch.bool)):
        logits = model(inputs_embeds=embeds).logits
    assert (golden["logits"] - golden["base_logits"]).abs().max() > 1e-2, "the golden data would show nothing"
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)


# The formula, one row and one factor at a time


def by_hand(module: RoutedLinear, output: Tensor, inputs: Tensor, prompt: Tensor) -> Tensor:
    """The module's docstring in plain loops, straight-through gates written as 1 + p - stopgrad(p)."""
    mode, rows = module.mode, []
    for row in range(len(inputs)):
        pooled = inputs[row][prompt[row]].mean(0).detach() if prompt[row].any() else torch.zeros(inputs.shape[2])
        for_a, for_b = (module.router_a @ pooled).softmax(0), (module.router_b @ pooled).softmax(0)
        chosen_a = for_a.argsort(descending=True)[: mode.rank]
        if mode.conditional:
            summed = torch.zeros(mode.factors)
            for place, factor in enumerate(chosen_a):
                summed = summed + (module.router_ab[place] @ module.routed_a[factor].detach()).softmax(0)
            for_b = (for_b + mode.ifs_weight * summed.softmax(0)) / (1 + mode.ifs_weight)
        chosen_b = for_b.argsort(descending=True)[: mode.rank]
        updated = output[row]
        for factor_a, factor_b in zip(chosen_a, chosen_b, strict=True):
            gate = (1 + for_a[factor_a] - for_a[factor_a].detach()) * (1 + for_b[factor_b] - for_b[factor_b].detach())
            update = torch.outer(inputs[row] @ module.routed_a[factor_a], module.routed_b[factor_b])
            updated = updated + mode.scale * gate * update
        rows.append(updated)
    return torch.stack(rows)


@pytest.mark.parametrize("conditional", [True, False], ids=["CFS", "IFS"])
def test_outputs_and_all_gradients_are_those_of_the_formula(conditional: bool) -> None:
    module = routed(MixLoRA(**SMALL, conditional=conditional, ifs_weight=0.7))
    prompt = torch.rand(5, 7) < 0.6
    prompt[4] = False
    output, weights = torch.randn(5, 7, 10), torch.randn(5, 7, 10)

    def gradients(run: Any) -> tuple[Tensor, list[Tensor]]:
        inputs = INPUTS.clone().requires_grad_()
        result = run(inputs)
        return result, list(torch.autograd.grad((result * weights).sum(), [inputs, *module.parameters()]))

    torch.manual_seed(1)
    INPUTS = torch.randn(5, 7, 12)
    ours, our_gradients = gradients(lambda inputs: module(output.clone(), inputs, a_pass(prompt)))
    theirs, their_gradients = gradients(lambda inputs: by_hand(module, output, inputs, prompt))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert all(bool(gradient.abs().max() > 0) for gradient in our_gradients)


class Hosts:
    """Two frozen linears with routed ones on them, called on one hidden state that is needed elsewhere too."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.linears = nn.ModuleDict({"one": nn.Linear(12, 10, bias=False), "two": nn.Linear(12, 10)})
        self.linears.requires_grad_(False)
        self.routed = {name: routed(MixLoRA(**SMALL)) for name in self.linears}
        self.parameters = [parameter for module in self.routed.values() for parameter in module.parameters()]
        self.leaf, self.weights = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 10)

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the modules on their hosts give, the hidden state there, and the same by the formula."""
        handles = hang(self.linears, dict(self.routed))
        hidden = self.leaf * 2
        with entered(Scope(this_pass=everything(2, 5))):
            ours = self._loss(hidden, *(host(hidden) for host in self.linears.values()))
        unhang(self.linears, dict(self.routed), handles)
        other, prompt = self.leaf * 2, torch.ones(2, 5, dtype=torch.bool)
        naive = (by_hand(self.routed[name], host(other), other, prompt) for name, host in self.linears.items())
        return ours, hidden, self._loss(other, *naive)

    def _loss(self, hidden: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return ((one + two + hidden[..., :10]) * self.weights).sum()


def test_through_hosts_all_gradients_are_those_of_the_formula_however_often_they_are_asked_for() -> None:
    hosts = Hosts()
    ours, hidden, theirs = hosts.losses()
    seen: list[Tensor] = []
    hidden.register_hook(lambda gradient: seen.append(gradient.clone()))
    expected = torch.autograd.grad(theirs, [hosts.leaf, *hosts.parameters])
    torch.autograd.grad(ours, hosts.parameters, retain_graph=True)  # does not come to the hidden state
    for _ in range(2):
        found = torch.autograd.grad(ours, [hosts.leaf, *hosts.parameters], retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen, [expected[0] / 2] * 2, atol=1e-4, rtol=1e-4)


def test_a_hook_that_watches_a_hosts_gradients_is_shown_all_of_them() -> None:
    hosts, shown = Hosts(), []
    watching = hosts.linears["one"].register_full_backward_hook(lambda _, given, __: shown.append(given[0].clone()))
    ours, *_ = hosts.losses()
    ours.backward()
    watching.remove()
    inputs = (hosts.leaf.detach() * 2).requires_grad_()
    by_hand(hosts.routed["one"], hosts.linears["one"](inputs), inputs, torch.ones(2, 5, dtype=torch.bool)).backward(
        hosts.weights
    )
    torch.testing.assert_close(shown, [inputs.grad], atol=1e-4, rtol=1e-4)


def test_the_backward_pass_makes_no_tensor_of_the_inputs_size_but_the_frozen_linears_own() -> None:
    made: set[int] = set()

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() == 2 * 50 * 12:
                made.add(result.untyped_storage().data_ptr())
                kept.append(result)  # so that no address is used twice
            return result

    kept: list[Tensor] = []
    stack = nn.ModuleDict({"host": nn.Linear(12, 10, bias=False).requires_grad_(False)})
    hang(stack, {"host": routed(MixLoRA(**SMALL))})
    inputs, weights = torch.randn(2, 50, 12, requires_grad=True), torch.randn(2, 50, 10)
    with entered(Scope(this_pass=everything(2, 50))):
        result = stack["host"](inputs)
    with Wide():
        torch.autograd.grad(result, inputs, weights)
    assert len(made) == 1


def test_the_gate_changes_no_bit_of_the_forward_value() -> None:
    learning, frozen = (routed(MixLoRA(**SMALL, router_grad=how)) for how in ("straight_through", "none"))
    frozen.load_state_dict(learning.state_dict())
    output, inputs = torch.randn(3, 7, 10), torch.randn(3, 7, 12)
    assert torch.equal(
        learning(output.clone(), inputs, everything(3, 7)), frozen(output.clone(), inputs, everything(3, 7))
    )


def test_frozen_routers_are_built_without_a_gradient_and_the_factors_still_learn() -> None:
    module = routed(MixLoRA(**SMALL, router_grad="none"))
    module(torch.randn(3, 7, 10), torch.randn(3, 7, 12), everything(3, 7)).sum().backward()
    learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert learning == {"routed_a", "routed_b"}
    assert all(parameter.grad is not None for parameter in (module.routed_a, module.routed_b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"conditional": False, "dropout": 0.3}, {"variant": "released"}])
def test_a_fresh_adapter_changes_no_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    module = RoutedLinear(64, 48, MixLoRA(**settings))
    output, inputs = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 64).to(dtype)
    for training in (True, False):
        result = module.train(training)(output.clone(), inputs, everything(2, 5))
        assert result.dtype == dtype
        assert torch.equal(result, output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_chooses_as_float32_does_and_comes_as_close_as_its_rounding(dtype: torch.dtype) -> None:
    module = routed(MixLoRA(), 256, 128)
    with torch.no_grad():
        module.routed_a.mul_(1 / 16)
        module.routed_b.mul_(0.1)
    inputs, output = torch.randn(3, 600, 256).to(dtype), torch.randn(3, 600, 128).to(dtype)
    half, whole = everything(3, 600), everything(3, 600)
    found = module(output.clone(), inputs, half)
    expected = module(output.float().clone(), inputs.float(), whole)
    assert found.dtype == dtype
    assert torch.equal(half.kept[module].a, whole.kept[module].a)
    assert torch.equal(half.kept[module].b, whole.kept[module].b)
    error = (found.float() - expected).detach().norm() / expected.detach().norm()
    assert float(error) < 4 * torch.finfo(dtype).eps


def test_equal_scores_go_to_the_lowest_numbers() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0, 2.0], [0.0] * 6])
    assert best(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_no_tensor_is_as_large_as_a_weight_for_every_row() -> None:
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            made = result if isinstance(result, (tuple, list)) else (result,)
            largest = max([largest, *(part.numel() for part in made if isinstance(part, Tensor))])
            return result

    module = routed(MixLoRA(), 200, 300)
    inputs = torch.randn(2, 5, 200, requires_grad=True)
    with Sizes():
        module(torch.randn(2, 5, 300), inputs, everything(2, 5)).sum().backward()
    assert largest == 4 * 16 * 200, "W_AB is the largest there is"


def test_dropout_falls_on_the_adapters_input_and_only_in_training() -> None:
    # One input feature: dropped, it takes the whole update of its position with it, and kept, it counts double.
    module = routed(MixLoRA(**SMALL, dropout=0.5), in_features=1)
    output, inputs = torch.zeros(1, 4000, 10), torch.randn(1, 1, 1).expand(1, 4000, 1)
    step = everything(1, 4000)
    plain = module.eval()(output.clone(), inputs, step).detach()
    assert torch.equal(plain[0, 0], plain[0, -1]) and bool(plain[0, 0].all())
    update = module.train()(output.clone(), inputs, step).detach() / plain
    assert {round(float(value), 3) for value in update.unique()} == {0.0, 2.0}
    assert torch.equal(update.amin(-1), update.amax(-1)), "it fell on the update, not on the input"
    assert 0.45 < float(update.mean()) / 2 < 0.55


def test_autocast_changes_neither_the_choice_nor_a_bit_of_the_update() -> None:
    module = routed(MixLoRA(), 256, 128)
    inputs, output = torch.randn(3, 40, 256), torch.randn(3, 40, 128)
    plain, cast = everything(3, 40), everything(3, 40)
    expected = module(output.clone(), inputs, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(inputs[0], inputs[0].T).dtype == torch.bfloat16, "autocast is off; it would show nothing"
        found = module(output.clone(), inputs, cast)
    assert torch.equal(found, expected)
    assert torch.equal(cast.kept[module].a, plain.kept[module].a)


def test_sequence_pooling_counts_every_position_and_prompt_pooling_none_but_the_prompts() -> None:
    prompt = torch.tensor([[True, True, False, False]])
    inputs = torch.randn(1, 4, 12)
    for routing, counted in (("sequence", slice(None)), ("prompt", slice(2))):
        module = routed(MixLoRA(**SMALL, routing=routing))
        step = a_pass(prompt)
        module(torch.zeros(1, 4, 10), inputs, step)
        scores = inputs[:, counted].mean(1) @ module.router_a.T
        assert step.kept[module].a.tolist() == scores.topk(3).indices.tolist()


# Hosts


def test_tokens_of_unknown_rows_are_refused_with_the_flag_to_use() -> None:
    module = routed(MixLoRA(**SMALL))
    with pytest.raises(TokenMapError, match="--mixlora_targets"):
        module(torch.randn(5, 10), torch.randn(5, 12), everything(2, 4))
    flat = module(torch.zeros(8, 10), torch.randn(8, 12), everything(2, 4))
    assert flat.shape == (8, 10)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_linear_is_a_host_like_any_other(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes").nn
    # On processors with these instructions bitsandbytes repacks the weights in evaluation, and training is then wrong.
    monkeypatch.setattr(bnb.modules, "has_avx512bf16", lambda: False)
    weight = torch.randn(96, 64)
    if bits == 4:
        host = bnb.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        host.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        host = bnb.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
        host.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    stack = nn.ModuleDict({"host": host.to("cpu")})
    assert stack["host"].weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    inputs = torch.randn(2, 5, 64, requires_grad=True)
    plain = stack["host"](inputs).detach()
    error = (plain - inputs.detach() @ weight.T).norm() / plain.norm()
    assert 0 < float(error) < 0.2, "it is not quantised, or not this weight"
    module = RoutedLinear(64, 96, MixLoRA())
    handles = hang(stack, {"host": module})
    with entered(Scope(this_pass=everything(2, 5))):
        assert torch.equal(stack["host"](inputs), plain)
        with torch.no_grad():
            module.routed_b.normal_()
        result = stack["host"](inputs)
    expected = module.eval()(plain.clone(), inputs, everything(2, 5))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(result, plain, atol=0.1)
    result.square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in module.parameters())
    assert bool(inputs.grad.any())
    unhang(stack, {"host": module}, handles)
    assert torch.equal(stack["host"](inputs), plain)
