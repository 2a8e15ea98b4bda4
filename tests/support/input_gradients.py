"""A small model with MixLoRA, hooks as users put them on its linears, and the ways in which gradients are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from routed import LONG, SHORT, adapted, batch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_steering_plugin import token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.base import ForwardPass, default_dtype
from llava_steering_plugin.modes.mixlora import RoutedLinear
from llava_steering_plugin.modes.mixlora_routing import Choice

HOSTS = ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj")
Gradients = dict[str, Tensor]


class WrittenOut(RoutedLinear):
    """The update as the paper writes it, in autograd's own operations; the load-balance loss is left out."""

    takes_backward = False

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass, weight: Tensor | None = None) -> Tensor:
        a, b = self.factors_for(inputs, this_pass, output.dtype)
        if self.learns:
            a, b = (each * gate(choice) for each, choice in zip((a, b), self.route(inputs, this_pass), strict=True))
        return output + torch.einsum("npi,nri,nro->npo", self.dropout(inputs), a, b)


def gate(choice: Choice) -> Tensor:
    """1 + p - stopgrad(p) of the chosen factors, [rows, r, 1]."""
    assert choice.probability is not None
    probability = choice.probability.gather(1, choice.factors).unsqueeze(-1)
    return 1 + probability - probability.detach()


class Watch:
    """Keeps what goes into and comes out of some linears of a model, as a user's own hooks do."""

    def __init__(self, model: Any):
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.handles = [
            model.model.get_submodule(path).register_forward_hook(self._hook(path), with_kwargs=False) for path in HOSTS
        ]

    def _hook(self, path: str) -> Callable[..., None]:
        def keep(host: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            self.inputs[path], self.outputs[path] = args[0], output

        return keep

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def forward(model: Any) -> Tensor:
    """A loss on the logits."""
    ids, attention = batch(SHORT + LONG, LONG, side="right")
    prompt = torch.zeros_like(attention, dtype=torch.bool)
    prompt[:, :4] = True
    with token_map(torch.zeros_like(prompt), attention, prompt), default_dtype(torch.float64):  # for transformers' mask
        logits: Tensor = model(ids, attention_mask=attention).logits
    return logits.square().mean()


@contextmanager
def setting(base: LlamaForCausalLM, *, train: bool, before: bool, written_out: bool, **settings: Any) -> Iterator[Any]:
    """A model with MixLoRA, in training or evaluation, and a user's hooks from before or after it was put on."""
    with ExitStack() as stack:
        watch = Watch(base) if before else None
        attachment = stack.enter_context(adapted(base, **{"balance": 0.0, **settings}))
        watch = watch or Watch(base)
        stack.callback(watch.remove)
        base.requires_grad_(False).train(train)
        for parameter in attachment.trained().values():
            parameter.requires_grad_(True)
        if written_out:
            for module in attachment.modules.values():
                module.__class__ = WrittenOut
        base.enable_input_require_grads()
        stack.callback(base.disable_input_require_grads)
        torch.manual_seed(5)
        yield attachment, watch


def by_grad(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    loss = forward(base)
    asked = {f"in {path}": watch.inputs[path] for path in HOSTS}
    if all(output.requires_grad for output in watch.outputs.values()):
        asked |= {f"out {path}": watch.outputs[path] for path in HOSTS}
    asked |= attachment.trained()
    return dict(zip(asked, torch.autograd.grad(loss, list(asked.values())), strict=True))


def by_tensor_hooks(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    found: Gradients = {}
    loss = forward(base)
    for path in HOSTS:
        watch.inputs[path].register_hook(lambda gradient, path=path: found.update({path: gradient}))
    loss.backward()
    return found | own(attachment)


def by_retained(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    loss = forward(base)
    for path in HOSTS:
        watch.inputs[path].retain_grad()
    loss.backward()
    kept = {path: watch.inputs[path].grad for path in HOSTS}
    return {path: gradient for path, gradient in kept.items() if gradient is not None} | own(attachment)


def by_backward_hooks(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    """As Grad-CAM: from full backward hooks of modules, gradients of inputs and of outputs."""
    found: Gradients = {}

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            found[f"in {path}"], found[f"out {path}"] = inputs[0], outputs[0]

        return base.model.get_submodule(path).register_full_backward_hook(hook)

    handles = [hook_for(path) for path in HOSTS]
    forward(base).backward()
    for handle in handles:
        handle.remove()
    return found | own(attachment)


def from_an_inner_loss(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    """A loss on the features that a linear gets, beside the loss of the model: a feature loss in training."""
    loss = forward(base)
    for path in HOSTS:
        loss = loss + watch.inputs[path].square().mean() * 3
    loss.backward()
    return own(attachment)


def after_a_partial_pass(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    """A pass that ends inside the model, one that an exception ends, and then a whole one over the same graph."""
    loss = forward(base)
    torch.autograd.grad(loss, watch.inputs[HOSTS[3]], retain_graph=True)
    torch.autograd.grad(loss * 7, watch.inputs[HOSTS[1]], retain_graph=True)

    def fail(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    handle = watch.inputs[HOSTS[0]].register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    handle.remove()
    base.zero_grad(set_to_none=True)
    asked = {path: watch.inputs[path] for path in HOSTS} | attachment.trained()
    return dict(zip(asked, torch.autograd.grad(loss, list(asked.values())), strict=True))


def twice_over_one_graph(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    loss = forward(base)
    once = torch.autograd.grad(loss, [watch.inputs[path] for path in HOSTS], retain_graph=True)
    again = torch.autograd.grad(loss, [watch.inputs[path] for path in HOSTS], retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    loss.backward()
    loss = forward(base)
    loss.backward()
    return dict(zip(HOSTS, again, strict=True)) | own(attachment)


def of_a_gradient(base: Any, attachment: Attachment, watch: Watch) -> Gradients:
    """A penalty on the gradient of the features, which needs the second derivative."""
    loss = forward(base)
    features = torch.autograd.grad(loss, [watch.inputs[path] for path in HOSTS], create_graph=True)
    penalty = loss + sum(gradient.square().sum() for gradient in features) * 100
    penalty.backward()
    return dict(zip(HOSTS, (gradient.detach() for gradient in features), strict=True)) | own(attachment)


def own(attachment: Attachment) -> Gradients:
    found = {name: value.grad.clone() for name, value in attachment.trained().items() if value.grad is not None}
    attachment.model.zero_grad(set_to_none=True)
    return found


WAYS = (
    by_grad,
    by_tensor_hooks,
    by_retained,
    by_backward_hooks,
    from_an_inner_loss,
    after_a_partial_pass,
    twice_over_one_graph,
    of_a_gradient,
)
