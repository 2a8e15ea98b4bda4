"""A problem made so that routing matters: learned routers against frozen ones, and LoRA of as many active factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from routed import everything
from torch import Tensor, nn

from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear

WIDTH, GROUPS, DELTA_RANK, POSITIONS, ROWS = 32, 4, 2, 6, 32
# Active factors: enough for two groups' deltas, too few for the sum of all four.
ACTIVE, POOL = 4, 16
STEPS, RATE, SEEDS = 2000, 1e-2, range(5)


@dataclass
class Teacher:
    """Inputs come in groups, and every group needs a low-rank delta of its own."""

    centres: Tensor
    deltas: Tensor

    @classmethod
    def drawn(cls, seed: int) -> Teacher:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        deltas = normal(GROUPS, WIDTH, DELTA_RANK) @ normal(GROUPS, DELTA_RANK, WIDTH)
        return cls(normal(GROUPS, WIDTH), deltas / WIDTH**0.5)

    def batch(self, generator: torch.Generator, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [rows, positions, width] each."""
        group = torch.randint(GROUPS, (rows,), generator=generator)
        inputs = self.centres[group, None] + torch.randn(rows, POSITIONS, WIDTH, generator=generator)
        return inputs, inputs @ self.deltas[group]


class Lora(nn.Module):
    """LoRA with as many factors as MixLoRA has active, on a base of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(WIDTH, ACTIVE) / WIDTH**0.5)
        self.b = nn.Parameter(torch.zeros(ACTIVE, WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.a @ self.b


class OnZeros(nn.Module):
    """MixLoRA on a base of zeros."""

    def __init__(self, balance: float = 0.0, router_grad: str = "straight_through"):
        super().__init__()
        mode = MixLoRA(POOL, ACTIVE, alpha=float(ACTIVE), router_grad=router_grad)
        self.routed = RoutedLinear(WIDTH, WIDTH, mode, balance)

    def forward(self, inputs: Tensor) -> Tensor:
        updated: Tensor = self.routed(torch.zeros_like(inputs), inputs, everything(*inputs.shape[:2]))
        return updated


def relative_error(make: Callable[[], nn.Module], seed: int) -> float:
    """Root mean square error on new inputs after training, over the targets' own."""
    teacher, generator = Teacher.drawn(seed), torch.Generator().manual_seed(seed + 100)
    torch.manual_seed(seed)
    model = make()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        inputs, targets = teacher.batch(generator)
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    inputs, targets = teacher.batch(generator, 2000)
    with torch.no_grad():
        return float((model.eval()(inputs) - targets).norm() / targets.norm())


WAYS: dict[str, Callable[[], nn.Module]] = {
    "learned and balanced": lambda: OnZeros(balance=0.05),
    "learned": OnZeros,
    "frozen": lambda: OnZeros(router_grad="none"),
    "LoRA": Lora,
}


@pytest.mark.slow
def test_learned_routers_end_below_frozen_ones_and_these_below_lora() -> None:
    errors = {name: [relative_error(make, seed) for seed in SEEDS] for name, make in WAYS.items()}
    mean = {name: sum(found) / len(found) for name, found in errors.items()}
    assert mean["learned and balanced"] < 0.9 * mean["frozen"], errors
    assert mean["learned"] < mean["frozen"], errors
    assert mean["frozen"] < 0.95 * mean["LoRA"], errors
    seeds = zip(errors["learned and balanced"], errors["frozen"], strict=True)
    assert sum(learned < frozen for learned, frozen in seeds) >= 4, errors
