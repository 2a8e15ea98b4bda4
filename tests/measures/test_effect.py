"""Effects are what hiding by hand gives, and gradients sum to the score's difference (`measures/effect.py`)."""

from __future__ import annotations

import pytest
import torch

from llava_steering_plugin.measures.effect import integrated_gradients, occlusion

SIDE = 6


def windows() -> torch.Tensor:
    """Four windows of 3 x 3 pixels, int64 [1, 1, 6, 6]."""
    place = torch.arange(SIDE) // 3
    return (place[:, None] * 2 + place[None])[None, None]


@pytest.mark.parametrize("at_once", [1, 3])
def test_hiding_a_window_costs_what_the_score_takes_from_it(at_once: int) -> None:
    pixels = torch.randn(1, 3, SIDE, SIDE)
    calls = []

    def score(given: torch.Tensor) -> torch.Tensor:
        """Depends on the upper right corner, and on the lower left one negatively."""
        calls.append(len(given))
        return 2 * given[:, :, :3, 3:].sum((1, 2, 3)) - given[:, 1, 3:, :3].sum((1, 2)) ** 2

    found = occlusion(score, pixels, windows(), at_once)
    corners = [0, 2 * pixels[0, :, :3, 3:].sum(), -(pixels[0, 1, 3:, :3].sum() ** 2), 0]
    torch.testing.assert_close(found.float(), torch.tensor(corners).float(), rtol=1e-4, atol=1e-4)
    assert calls == [1, *([1] * 4 if at_once == 1 else [3, 1])]


def test_gradients_sum_to_the_difference_from_the_mean_colour_and_lie_where_the_score_depends() -> None:
    pixels = torch.randn(1, 3, SIDE, SIDE)

    def score(given: torch.Tensor) -> torch.Tensor:
        return given[:, :, :3, 3:].sin().sum((1, 2, 3)) + given[:, 0, 5, 0] ** 3

    found, gap = integrated_gradients(score, pixels, windows())
    assert gap == pytest.approx(0, abs=1e-4)
    _, coarse = integrated_gradients(score, 9 * pixels, windows(), steps=1)
    halfway = (4.5 * pixels).requires_grad_()
    (gradient,) = torch.autograd.grad(score(halfway), halfway)
    expected = (9 * pixels * gradient).sum() - score(9 * pixels)
    assert coarse == pytest.approx(expected.item(), rel=1e-3)
    corner = pixels[0, :, :3, 3:].sin().sum()
    expected = torch.tensor([0, corner, pixels[0, 0, 5, 0] ** 3, 0])
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_tiles_that_show_one_part_of_the_image_are_hidden_together() -> None:
    pixels = torch.randn(1, 2, 3, SIDE, SIDE)
    numbers = torch.stack([windows()[0], torch.full((1, SIDE, SIDE), 1)])[None]
    numbers[0, 1, :, :, 0] = 4  # shows no part of the image
    found = occlusion(lambda given: given.sum((1, 2, 3, 4)), pixels, numbers)
    second = pixels[0, 0, :, :3, 3:].sum() + pixels[0, 1, :, :, 1:].sum()
    assert found[1].item() == pytest.approx(second.item(), abs=1e-4)
    assert found[4].item() == pytest.approx(pixels[0, 1, :, :, 0].sum().item(), abs=1e-4)
