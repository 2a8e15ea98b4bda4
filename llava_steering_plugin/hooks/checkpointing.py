"""Let gradient checkpointing recompute a layer in the scope of its forward pass, and hand its gradients on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.hooks.scope import current, entered
from llava_steering_plugin.modes.base import DecoderShape


def bound_to_scope(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a gradient-checkpointing function so that the recomputation sees the scope of its forward.

    The recomputation runs in the backward pass, after the scope has closed and, on CUDA, in autograd's own thread.
    Without the wrapper the layers would be recomputed without the adapter, and no error would say so.

    The wrapped function is called on hidden states that need a gradient. torch's reentrant checkpointing gives the
    parameters in a layer none where its inputs need none. `enable_input_require_grads` sees to that with a hook on the
    embeddings, which is lost when they are replaced, as a tokenizer that grows does; ready-made `inputs_embeds` pass it
    by.
    """
    if hasattr(checkpoint, "_bound_to_scope"):
        return checkpoint

    def bound(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args and torch.is_grad_enabled():
            args = (_needing_gradient(args[0]), *args[1:])
        scope = current()
        if scope is None:
            return checkpoint(run, *args, **kwargs)

        def reinstated(*inner: Any, **named: Any) -> Any:
            with entered(scope):
                return run(*inner, **named)

        return checkpoint(reinstated, *args, **kwargs)

    bound._bound_to_scope = checkpoint  # type: ignore[attr-defined]
    return bound


def _needing_gradient(hidden: Any) -> Any:
    """Return the hidden states themselves if they need a gradient, and otherwise a view of them that does."""
    if not isinstance(hidden, Tensor) or hidden.requires_grad or not hidden.is_floating_point():
        return hidden
    return hidden.detach().requires_grad_()


def unbound(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that `bound_to_scope` has wrapped; any other function as it is."""
    original: Callable[..., Any] = getattr(checkpoint, "_bound_to_scope", checkpoint)
    return original


def checkpointing_parts(stack: nn.Module, shape: DecoderShape) -> list[nn.Module]:
    """Return the modules that may hold a checkpointing function: the stack or, in newer transformers, every layer."""
    return [stack, *(stack.get_submodule(layer.path) for layer in shape.layers)]


def change_checkpointing(parts: list[nn.Module], change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the checkpointing function of every part that has one by what `change` makes of it."""
    for part in parts:
        if checkpoint := part.__dict__.get("_gradient_checkpointing_func"):
            part.__dict__["_gradient_checkpointing_func"] = change(checkpoint)
