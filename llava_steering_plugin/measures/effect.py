"""Measure which parts of an image an answer depends on: its effect, where attention may have none.

Attention need not explain an answer (arXiv 1902.10186). Two attributions of captum ask the model itself, for F(x), the
summed log-probability of the answer's tokens given the pixels x:

    occlusion    F(x) - F(x with a window of the image at the baseline)     (arXiv 1311.2901, section 4.2)
    gradients    (x - x') . mean over steps of grad F, along the way from the baseline x' to x: integrated gradients
                 (arXiv 1703.01365, eq. 1); they sum to F(x) - F(x')

The baseline is 0 in preprocessed pixels, the vision tower's mean colour, with which LLaVA pads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# F: float [rows] from pixels [rows, ...].
Score = Callable[[Tensor], Tensor]
OCCLUSION, GRADIENTS, NONE = "occlusion", "gradients", "none"
EFFECTS = (OCCLUSION, GRADIENTS, NONE)
# Points on the way from the baseline to the image.
STEPS = 64
# Gradients in half precision are lost below 6e-8; so the score is multiplied before, and the result divided.
SCALE = 256.0


def occlusion(score: Score, pixels: Tensor, windows: Tensor, at_once: int = 1) -> Tensor:
    """Return how much the score falls when each window of the image is hidden, float64 [windows].

    Positive: the answer needs what is there. One pass for each window, and one for the whole image.

    Args:
        pixels: float [1, ...].
        windows: int64, broadcastable to `pixels`, the number of each pixel's window: from 0, none left out.
        at_once: windows hidden in one call of `score`, in rows of their own.
    """
    from captum.attr import FeatureAblation  # captum's Occlusion is one, over windows of one rectangle of pixels

    falls = FeatureAblation(score).attribute(pixels, feature_mask=windows, perturbations_per_eval=at_once)
    everywhere = windows.expand_as(pixels).flatten()
    found = torch.zeros(int(windows.max()) + 1, dtype=torch.float64)
    # All pixels of a window hold its fall.
    found[everywhere.cpu()] = falls.flatten().double().cpu()
    return found


def integrated_gradients(score: Score, pixels: Tensor, windows: Tensor, steps: int = STEPS) -> tuple[Tensor, float]:
    """Return the integrated gradients, summed over the pixels of each window, float64 [windows], and their gap.

    The gap is what their sum exceeds F(x) - F(x') by: the error of a finite number of steps.

    Args:
        pixels, windows: as in `occlusion`; the windows are only where the sums are taken.
        steps: one pass forward and backward each.
    """
    from captum.attr import IntegratedGradients

    def scaled(given: Tensor) -> Tensor:
        return score(given) * SCALE

    with torch.enable_grad():
        found, gap = IntegratedGradients(scaled).attribute(
            pixels, baselines=0, n_steps=steps, internal_batch_size=1, return_convergence_delta=True
        )
    sums = torch.zeros(int(windows.max()) + 1, dtype=torch.float64)
    everywhere = windows.expand_as(pixels).flatten().cpu()
    sums.index_add_(0, everywhere, found.detach().flatten().double().cpu())
    return sums / SCALE, float(gap) / SCALE
