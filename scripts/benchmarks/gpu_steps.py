"""Time training steps, prefills and decode steps, and measure their memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .gpu_sizes import Size
from .shared import process_memory

IMAGE = -200  # upstream's placeholder for an image among token ids


@dataclass(frozen=True)
class Trained:
    """Seconds of a step (median and extremes), and the peak memory in bytes, weights included."""

    parameters: int
    seconds: float
    fastest: float
    slowest: float
    peak: int
    loss: float


@dataclass(frozen=True)
class Generated:
    """Seconds of the prefill of one prompt with an image, and the tokens per second after it."""

    prefill: float
    tokens_per_second: float


def train(model: Any, parameters: list[nn.Parameter], size: Size) -> Trained:
    """Run training steps as upstream does: autocast, gradient checkpointing, AdamW. Without parameters, only passes.

    The frozen model computes gradients of its inputs, as a trained projector needs them.
    """
    device = model.device
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    ids, images, labels = random_batch(size, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, images=images, labels=labels, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    for _ in range(size.warmup):
        step()
    gc.collect()
    cuda = device.type == "cuda"
    process_memory.forget_peak(cuda=cuda)
    seconds, losses = zip(*(timed(step, device) for _ in range(size.steps)), strict=True)
    peak = process_memory.peak(cuda=cuda)
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    count = sum(parameter.numel() for parameter in parameters)
    return Trained(count, statistics.median(seconds), min(seconds), max(seconds), peak, losses[-1])


def generate(model: Any, size: Size) -> Generated:
    """Time greedy answers of a fixed length to one prompt."""
    device = model.device
    model.eval()
    model.config.use_cache = True
    ids, images, _ = random_batch(size, device)
    prompt, picture = ids[:1], images[:1].to(model.get_model().mm_projector[0].weight.dtype)

    def answer(tokens: int) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            model.generate(
                prompt,
                images=picture,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )

    answer(2)
    first = statistics.median(timed(lambda: answer(1), device)[0] for _ in range(size.rounds))
    whole = statistics.median(timed(lambda: answer(1 + size.tokens), device)[0] for _ in range(size.rounds))
    return Generated(first, size.tokens / max(whole - first, 1e-9))


def random_batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids [batch, text + 1] with one image each, pixels, and labels on the second half of the text."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size.vocabulary, (size.batch, size.text + 1), generator=drawn)
    ids[:, 4] = IMAGE
    labels = ids.clone()
    labels[:, : size.text // 2] = -100
    images = torch.rand(size.batch, 3, size.side, size.side, generator=drawn)
    return ids.to(device), images.to(device), labels.to(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of one call, until the device has finished it, and the call's result."""
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
