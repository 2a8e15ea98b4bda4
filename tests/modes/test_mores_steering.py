"""MoReS' steering of one layer: its formula, its orthonormal rows and what it computes in."""

from __future__ import annotations

import pytest
import torch
from steered import away_from_identity
from torch.utils._python_dispatch import TorchDispatchMode

from llava_steering_plugin.modes.mores import Steering

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def defect(basis: torch.Tensor) -> float:
    """Largest entry of |R R^T - I|, in double precision."""
    basis = basis.detach().double()
    return float((basis @ basis.T - torch.eye(len(basis), dtype=torch.double)).abs().max())


def test_a_fresh_adapter_learns_its_subspace_from_the_second_step_on() -> None:
    steering = Steering(32, 2)
    optimizer = torch.optim.SGD(steering.parameters(), lr=0.1)
    hidden, target = torch.randn(5, 32), torch.randn(5, 32)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        ((hidden + steering(hidden) - target) ** 2).mean().backward()
        moved.append({name: bool(value.grad.abs().max() > 0) for name, value in steering.named_parameters()})
        optimizer.step()
    assert moved[0] == {"steer_basis": False, "steer_shift": True, "steer_offset": True}
    assert all(moved[1].values())


# Orthonormal rows, finite gradients


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rows_are_orthonormal_and_gradients_finite(rank: int, condition: float, scale: float) -> None:
    steering = Steering(96, rank)
    left, right = torch.linalg.qr(torch.randn(rank, rank))[0], torch.linalg.qr(torch.randn(96, rank))[0]
    stretch = torch.logspace(0, -torch.tensor(condition).log10().item(), rank) if rank > 1 else torch.ones(1)
    with torch.no_grad():
        steering.steer_basis.copy_(scale * left @ torch.diag(stretch) @ right.T)
        steering.steer_shift.normal_()
        steering.steer_offset.normal_()
    assert defect(steering.basis()) < 1e-5
    steering(torch.randn(7, 96)).square().sum().backward()
    for name, parameter in steering.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_rows_stay_orthonormal_under_weight_decay_and_large_steps() -> None:
    steering = Steering(64, 8)
    optimizer = torch.optim.AdamW(steering.parameters(), lr=0.1, weight_decay=1.0)
    hidden, target = torch.randn(16, 64), torch.randn(16, 64)
    for _ in range(60):
        optimizer.zero_grad()
        ((hidden + steering(hidden) - target) ** 2).mean().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in steering.parameters())
        optimizer.step()
        assert defect(steering.basis()) < 1e-5


def test_weight_decay_alone_does_not_turn_the_subspace() -> None:
    steering = Steering(64, 4)
    before = steering.basis()
    with torch.no_grad():
        steering.steer_basis.mul_(1e-3)
    torch.testing.assert_close(steering.basis(), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["plain", "bf16", "fp16"])
def test_the_update_is_computed_in_float32_whatever_the_model_runs_in(
    dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    steering = Steering(64, 4)
    away_from_identity(steering)
    hidden = (torch.randn(6, 64) * 10).to(dtype).requires_grad_()
    rotation = torch.linalg.qr(steering.steer_basis.detach().double().T)[0].T  # any basis of the same subspace
    wide = hidden.detach().double()
    with torch.no_grad():
        change = steering.basis().double()
        expected = (wide @ steering.steer_shift.double().T + steering.steer_offset.double()) @ change
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        update = steering(hidden)
        assert defect(steering.basis()) < 1e-5
        update.float().sum().backward()
    assert update.dtype == dtype
    unit = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(update.double(), expected, atol=max(4 * unit, 1e-3), rtol=0)
    outside = expected - expected @ rotation.T @ rotation
    assert outside.abs().max() < 1e-4, "the update must stay in the subspace"
    assert torch.isfinite(hidden.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in steering.parameters())


def test_the_update_is_the_papers_formula() -> None:
    steering = Steering(16, 2)
    rotation = torch.linalg.qr(torch.randn(16, 2))[0].T
    weight, offset, hidden = torch.randn(2, 16), torch.randn(2), torch.randn(3, 16)
    steering.set_paper_weights(rotation, weight, offset)
    for row in range(3):
        expected = rotation.T @ (weight @ hidden[row] + offset - rotation @ hidden[row])
        torch.testing.assert_close(steering(hidden)[row], expected, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
        return results


def test_no_buffer_and_no_intermediate_is_as_large_as_the_square_of_the_width() -> None:
    width, tokens, rank = 512, 6, 4
    steering = Steering(width, rank)
    away_from_identity(steering)
    assert not list(steering.buffers())
    hidden = torch.randn(tokens, width, requires_grad=True)
    with LargestTensor() as largest:
        steering(hidden).sum().backward()
    assert largest.numel == tokens * width
