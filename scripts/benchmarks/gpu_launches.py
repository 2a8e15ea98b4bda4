"""Count what a training step launches, time steps by batch, and time a decoder layer as a captured CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.hooks.scope import Scope, entered
from llava_steering_plugin.modes.base import ForwardPass

from .gpu_sizes import Size
from .gpu_steps import random_batch, timed, train
from .shared.launches import Launches

BATCHES = (1, 16)
NO_GRAPH = "no CUDA device, which captures graphs"


@dataclass(frozen=True)
class Launched:
    """The operations of a training step, and times in which their number shows.

    Attributes:
        forward, backward: operations of a step that are no views, without gradient checkpointing.
        steps: seconds of a training step by batch, or why there are none.
        layer: seconds of a decoder layer's forward, without gradients.
        replay: seconds of the same as a captured graph, or why there is none.
    """

    forward: int
    backward: int
    steps: dict[int, float | str]
    layer: float
    replay: float | str


def launched(model: Any, parameters: list[nn.Parameter], size: Size) -> Launched:
    """Count and time them; the model is left in training mode."""
    forward, backward = _counted(model, size)
    steps: dict[int, float | str] = {}
    for batch in BATCHES:
        try:
            steps[batch] = train(model, parameters, replace(size, batch=batch, warmup=1)).seconds
        except torch.cuda.OutOfMemoryError as error:
            steps[batch] = f"{type(error).__name__}: {error}"[:200]
    return Launched(forward, backward, steps, *_layer(model, size))


def _counted(model: Any, size: Size) -> tuple[int, int]:
    """Count the operations of the forward and backward pass of one row."""
    device = model.device
    model.train()
    ids, images, labels = random_batch(replace(size, batch=1), device)
    model.enable_input_require_grads()
    with torch.autocast(device.type, torch.bfloat16), Launches() as forward:
        loss = model(input_ids=ids, images=images, labels=labels, attention_mask=torch.ones_like(ids)).loss
    with Launches() as backward:
        loss.backward()
    model.zero_grad(set_to_none=True)
    model.disable_input_require_grads()
    return forward.total, backward.total


def _layer(model: Any, size: Size) -> tuple[float, float | str]:
    """Time one decoder layer in a pass that has run before: what a pass waits for the device for is known then."""
    device, layer = model.device, model.get_model().layers[0]
    model.eval()
    visual = torch.zeros(1, (size.side // size.patch) ** 2 + size.text, dtype=torch.bool, device=device)
    visual[:, : -size.text] = True
    this_pass = ForwardPass(visual, ~visual, torch.ones_like(visual), False, {})
    hidden = torch.randn(*visual.shape, size.width, device=device, dtype=torch.bfloat16)
    positions = torch.arange(visual.shape[1], device=device).unsqueeze(0)

    def call() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            result: Tensor = layer(hidden, position_ids=positions)[0]
        return result

    with torch.no_grad(), entered(Scope(this_pass=this_pass)):
        for _ in range(3):
            call()
        eager = statistics.median(timed(call, device)[0] for _ in range(10))
        if device.type != "cuda":
            return eager, NO_GRAPH
        try:
            replay = _captured(call)
        except Exception as error:  # noqa: BLE001 - what cannot be captured is a result, too
            return eager, f"{type(error).__name__}: {error}"[:200]
        return eager, statistics.median(timed(replay, device)[0] for _ in range(10))


def _captured(call: Callable[[], Tensor]) -> Callable[[], None]:
    """Return the replay of a call as a CUDA graph."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay
