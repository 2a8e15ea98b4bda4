"""Gradients on a GPU, where autograd recomputes checkpointed layers in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_runs import MODES, RUNS, accumulation, gradients
from steered import load_llava, strengthen
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, remove

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(scope="module")
def base(tiny: TinyLlava, patched_llava: Path) -> Any:
    return load_llava(tiny.llava).to(DEVICE)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", sorted(MODES))
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run_on_cuda_too(
    base: Any, mode: str, dtype: torch.dtype | None, run: Callable[[Any], None]
) -> None:
    strengthen(attach(base, mode, **MODES[mode]), size=0.05)
    try:
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
            plain = gradients(base, run, "off")
            found = {how: gradients(base, run, how) for how in ("reentrant", "not reentrant")}
    finally:
        remove(base)
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    assert scale > 1e-6
    # A recomputation repeats the same kernels; only sums by atomic additions may come in another order.
    tolerance = 1e-5 if dtype is None else 1e-2
    for how, again in found.items():
        for name, gradient in plain.items():
            torch.testing.assert_close(
                again[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=f"{how}: {name}"
            )


@pytest.mark.parametrize("mode", sorted(MODES))
def test_cuda_gives_the_gradients_of_the_processor(base: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tower's first layer is a convolution, which cuDNN computes in TF32 unless told otherwise.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    without_chance = {name: value for name, value in MODES[mode].items() if name not in ("dropout", "noise")}
    strengthen(attach(base, mode, **without_chance), size=0.05)
    try:
        there = gradients(base, accumulation, "off")
        base.cpu()
        here = gradients(base, accumulation, "off")
    finally:
        base.to(DEVICE)
        remove(base)
    scale = max(float(gradient.abs().max()) for gradient in here.values())
    for name, gradient in here.items():
        torch.testing.assert_close(there[name].cpu(), gradient, rtol=1e-3, atol=1e-3 * scale, msg=name)
