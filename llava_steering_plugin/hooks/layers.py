"""Finds a model's decoder stack and hangs modules on its layers and linears. Structure decides, never model names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.hooks.scope import Scope, TokenMap, bound_to_scope, current, unbound
from llava_steering_plugin.modes.base import DecoderShape, LayerShape, Pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The name under which a mode's module becomes a child of its host: part of the names in checkpoints of a training run.
CHILD = "steering"


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, DecoderShape]:
    """The decoder stack of a Hugging Face causal model, and its shape.

    The stack is what `model.base_model` names; its layers are the shallowest list of `num_hidden_layers` modules in it.

    Raises:
        SteeringError: no such list, or several equally shallow ones.
    """
    config = model.config
    stack: nn.Module = model.base_model
    layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (path.count("."), path, module)
        for path, module in stack.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    shallowest = [entry for entry in lists if entry[0] == min(lists)[0]] if lists else []
    if len(shallowest) != 1:
        raise SteeringError(
            f"{type(model).__name__}: expected one list of {layers} decoder layers in {type(stack).__name__}, found "
            f"{', '.join(path for _, path, _ in shallowest) or 'none'}. Only decoder-only language models can be tuned."
        )
    _, path, found = shallowest[0]
    shapes = tuple(
        LayerShape(f"{path}.{number}", _linears(f"{path}.{number}", layer)) for number, layer in enumerate(found)
    )
    return stack, DecoderShape(int(config.hidden_size), shapes)


def _linears(prefix: str, layer: nn.Module) -> dict[str, tuple[int, int]]:
    # bitsandbytes' quantised linears are subclasses too; features rather than weight shapes, which packing changes.
    return {
        f"{prefix}.{path}": (module.in_features, module.out_features)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def hang(stack: nn.Module, modules: dict[str, nn.Module]) -> list[RemovableHandle]:
    """Makes each module a child of its host, on the host's device, and lets it replace the host's output."""
    hosts = {path: stack.get_submodule(path) for path in modules}  # all of them before any is touched
    handles = []
    for path, module in modules.items():
        host = hosts[path]
        device = device_of(host)
        module.train(host.training)
        host.add_module(CHILD, module if device is None else module.to(device))
        if hasattr(module, "enter"):
            handles.append(host.register_forward_pre_hook(_replace_input))
        handles.append(host.register_forward_hook(_replace_output, with_kwargs=True))
    return handles


def device_of(host: nn.Module) -> torch.device | None:
    """Where `host` computes: not always where its parameters are, which accelerate may have offloaded."""
    for part in host.modules():
        computes_on = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if computes_on is not None:
            return torch.device(computes_on)
    anchor = next(host.parameters(), None)
    return None if anchor is None else anchor.device


def unhang(stack: nn.Module, modules: dict[str, nn.Module], handles: list[RemovableHandle]) -> None:
    """Undoes `hang`."""
    for handle in handles:
        handle.remove()
    for path in modules:
        delattr(stack.get_submodule(path), CHILD)


def _replace_input(host: nn.Module, args: tuple[Any, ...]) -> Any:
    if not args or not torch.is_grad_enabled():
        return None
    if _step() is None:
        return None
    module: Any = host.get_submodule(CHILD)
    return (module.enter(args[0]), *args[1:])


def _replace_output(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    step = _step()
    if step is None:
        return None
    module: nn.Module = host.get_submodule(CHILD)
    return replaced(output, module(hidden_of(output), inputs_of(args, kwargs), step))


def _step() -> Pass | None:
    """The pass that the hosts' modules work in; None where they are kept out."""
    scope = current()
    return scope.step if scope is not None else None


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer or linear was called on, from the arguments of its call."""
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer or linear gave."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def replaced(output: Any, hidden: Tensor) -> Any:
    """What a layer or linear gave, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def watch(
    stack: nn.Module, shape: DecoderShape, owner: object, takes_images: bool, begin: Callable[[Scope, Pass], None]
) -> RemovableHandle:
    """Has every pass through the decoder stack described before its first layer runs.

    Args:
        stack, shape: as `find_decoder` gives them.
        owner: whose modules work in the stack.
        takes_images: the model splices images itself, so that a generation without a map is one without images.
        begin: is told of every pass that `owner` has not been kept out of.
    """
    names = list(inspect.signature(stack.forward).parameters)
    parts = _checkpointing_parts(stack, shape)

    def describe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # transformers sets the function in `train()` and may replace it, so it is looked at in every pass that may be
        # recomputed. In the others, decode steps above all, it would cost as much as all that follows.
        if torch.is_grad_enabled():
            _change_checkpointing(parts, bound_to_scope)
        scope = current()
        if scope is None:
            raise TokenMapError(
                f"{type(stack).__name__} was called on its own, so nobody knows which positions are visual. Call the "
                "whole model, or wrap the call in `with token_map(visual=mask):`."
            )
        scope.step, scope.groups = None, ()
        if id(owner) not in scope.disabled:
            begin(scope, _pass(scope, {**dict(zip(names, args, strict=False)), **kwargs}, takes_images))

    return stack.register_forward_pre_hook(describe, with_kwargs=True)


def unwatch(stack: nn.Module, shape: DecoderShape, handle: RemovableHandle) -> None:
    """Undoes `watch`."""
    handle.remove()
    _change_checkpointing(_checkpointing_parts(stack, shape), unbound)


def _checkpointing_parts(stack: nn.Module, shape: DecoderShape) -> list[nn.Module]:
    """Who may hold a checkpointing function: the stack or, in newer versions of transformers, every layer."""
    return [stack, *(stack.get_submodule(layer.path) for layer in shape.layers)]


def _change_checkpointing(parts: list[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    for part in parts:
        if checkpoint := part.__dict__.get("_gradient_checkpointing_func"):
            part.__dict__["_gradient_checkpointing_func"] = change(checkpoint)


def _pass(scope: Scope, given: dict[str, Any], takes_images: bool) -> Pass:
    hidden = given.get("inputs_embeds")
    if hidden is None:
        hidden = given["input_ids"]
    rows, positions = hidden.shape[:2]
    cached = _cached(given.get("past_key_values"))
    if cached and positions == 1:
        step = torch.zeros(rows, 1, dtype=torch.bool, device=hidden.device)
        return Pass(step, ~step, step, True, scope.kept)
    if cached:
        raise TokenMapError(
            f"{positions} positions at once over a cache of {cached}: neither a prefill nor a decode step, so the "
            "adapter cannot tell which of them are visual. Assisted decoding and chunked prefills are not supported."
        )
    if scope.tokens is None and scope.generating and takes_images:
        attention = given.get("attention_mask")
        if attention is None or attention.shape != (rows, positions):
            attention = hidden.new_ones(rows, positions, dtype=torch.bool)
        scope.tokens = TokenMap.of_text(attention)
    if scope.tokens is None:
        raise TokenMapError(
            "the model was called with inputs_embeds (or is no LLaVA), and nobody said which positions are visual. "
            "Pass input_ids and images, or wrap the call in `with token_map(visual=mask, attention=mask):`."
        )
    tokens = scope.tokens.expanded(rows) if scope.generating else scope.tokens
    if tokens.visual.shape != (rows, positions):
        raise TokenMapError(
            f"the token map describes {list(tokens.visual.shape)} [rows, positions] and the hidden states are "
            f"{[rows, positions]}. A map holds for the one batch it was made for."
        )
    return Pass(tokens.visual, tokens.attention & ~tokens.visual, tokens.prompt, False, scope.kept)


def _cached(cache: Any) -> int:
    """Positions in a key-value cache, in whatever form transformers keeps it."""
    if cache is None or (isinstance(cache, (tuple, list)) and not cache):
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    first = cache[0][0]
    return int(first.shape[-2]) if isinstance(first, Tensor) else 0
