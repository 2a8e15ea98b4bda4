"""Ways to come to gradients that have to be the same with gradient checkpointing and without, on any device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from steered import IGNORED, IMAGE, PROMPT, generate, ids_of, pictures, words
from torch import Tensor

from llava_steering_plugin import disabled

# The modes with everything in them that a recomputation has to repeat, and that the same seed repeats.
MODES: dict[str, dict[str, Any]] = {
    "mores": {"rank": 2, "tokens": "f4+l5", "modality": "vis+text", "dropout": 0.1},
    "mixlora": {"factors": 8, "rank": 2, "dropout": 0.1, "noise": 0.5, "balance": 0.5},
}
MODES["mores+mixlora"] = {
    f"{mode}_{name}": value for mode in ("mores", "mixlora") for name, value in MODES[mode].items()
}


def train_setup(model: Any, checkpointing: str) -> None:
    model.train()
    model.requires_grad_(False)
    for parameter in model.llava_steering.parameters().values():
        parameter.requires_grad_(True)
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()


def train_teardown(model: Any) -> None:
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


def batch_of(seed: int, *, text_only: bool = False) -> dict[str, Any]:
    """Two rows of different lengths, the image of each elsewhere; the second has none for odd seeds."""
    rows = [
        [1, *words(2, seed), IMAGE, *words(5, seed + 1)],
        [1, *words(6, seed + 2)] if seed % 2 else [1, IMAGE, *words(4, seed + 2), 300],
    ]
    if text_only:
        rows = [[1, *words(8, seed)], [1, *words(6, seed + 2)]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((ids == 0) | (ids == IMAGE), IGNORED)
    labels[:, :3] = IGNORED
    images = None if text_only else pictures(2, seed)
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": labels, "images": images}


def loss_of(model: Any, seed: int, *, text_only: bool = False) -> Tensor:
    """The loss of `batch_of`, on the device that the model is on."""
    batch = {name: value for name, value in batch_of(seed, text_only=text_only).items() if value is not None}
    loss: Tensor = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
    return loss


def one_step(model: Any) -> None:
    loss_of(model, 0).backward()


def two_forwards_then_two_backwards(model: Any) -> None:
    losses = [loss_of(model, seed) for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def accumulation(model: Any) -> None:
    for seed in (0, 1, 2):
        (loss_of(model, seed) / 3).backward()


def generation_between_forward_and_backward(model: Any) -> None:
    loss = loss_of(model, 0)
    model.eval()
    generate(model, ids_of(PROMPT).to(model.device), pictures(1).to(model.device))
    model.train()
    loss.backward()


def text_between_forward_and_backward(model: Any) -> None:
    losses = [loss_of(model, 0), loss_of(model, 0, text_only=True)]
    for loss in losses:
        loss.backward()


def backward_in_another_thread(model: Any) -> None:
    loss = loss_of(model, 0)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(loss.backward).result()


def disabled_then_enabled(model: Any) -> None:
    with disabled(model):
        off = loss_of(model, 0)
    on = loss_of(model, 1)
    (on + off).backward()


RUNS = (
    one_step,
    two_forwards_then_two_backwards,
    accumulation,
    generation_between_forward_and_backward,
    text_between_forward_and_backward,
    backward_in_another_thread,
    disabled_then_enabled,
)


def gradients(model: Any, run: Callable[[Any], None], checkpointing: str) -> dict[str, Tensor]:
    """What `run` leaves in the adapter's parameters; checkpointing is "off", "reentrant" or "not reentrant"."""
    train_setup(model, checkpointing)
    torch.manual_seed(5)  # dropout and the routers' noise
    try:
        run(model)
        parameters = model.llava_steering.parameters()
        assert all(parameter.grad is not None for parameter in parameters.values())
        found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        model.zero_grad(set_to_none=True)
        return found
    finally:
        train_teardown(model)
