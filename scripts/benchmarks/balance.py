"""Measure what MixLoRA's load-balance loss is worth on a problem made for routing, by the rows that it sees at once.

    python scripts/benchmarks balance [--seeds N] [--quick] [--json FILE]

Inputs come in four groups, and each group needs a low-rank change of its own. A router has four active factors: enough
for two groups, too few for the sum of all. Every step has 32 rows, in one pass or in many: accumulated micro-batches
and ranks. The gradient is the same either way, but for the balance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps, Tally

from .shared.machine import machine, open_console
from .shared.verdicts import table_of, write_json

WIDTH, GROUPS, DELTA_RANK, POSITIONS, ROWS = 32, 4, 2, 6, 32
ACTIVE, POOL = 4, 16
STEPS, RATE = 2000, 1e-2
BALANCE = 0.05


@dataclass
class Teacher:
    """Inputs come in groups, and every group needs a low-rank delta of its own."""

    centres: Tensor
    deltas: Tensor

    @classmethod
    def drawn(cls, seed: int) -> Teacher:
        """Draw a teacher."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        deltas = normal(GROUPS, WIDTH, DELTA_RANK) @ normal(GROUPS, DELTA_RANK, WIDTH)
        return cls(normal(GROUPS, WIDTH), deltas / WIDTH**0.5)

    def batch(self, generator: torch.Generator, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, [rows, positions, width] each."""
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


class InPasses(RoutedLinear):
    """Routes the rows of a whole step at once, and balances them as the passes that they are cut into.

    Weights do not change within a step, so the gradients are those of one pass after the other, on one rank or several.

    Args:
        rows: of a pass.
        over_step: the balance is over the whole step; otherwise every pass is balanced on its own.
    """

    def __init__(self, mode: MixLoRA, balance: float, rows: int, over_step: bool):
        super().__init__(WIDTH, WIDTH, mode, balance)
        self.rows = rows
        self.over_steps = BalanceOverSteps(dict(zip("ab", self.tallies, strict=True)))
        self.over_steps.begin(ROWS // rows if over_step else 1)

    def shares(self, tallies: Sequence[Tally], choices: Tensor) -> Tensor:
        """Return f for each row, float32 [routers, rows, E]: that of the pass that the row belongs to."""
        of_passes = []
        for choice in torch.split(choices, self.rows, 1):
            of_passes.append(super().shares(tallies, choice).unsqueeze(1).expand(-1, choice.shape[1], -1))
        return torch.cat(of_passes, 1)


class OnZeros(nn.Module):
    """MixLoRA on a base of zeros."""

    def __init__(
        self, balance: float = 0.0, router_grad: str = "straight_through", rows: int = ROWS, over_step: bool = True
    ):
        super().__init__()
        mode = MixLoRA(POOL, ACTIVE, alpha=float(ACTIVE), router_grad=router_grad)
        self.routed = InPasses(mode, balance, rows, over_step)

    def forward(self, inputs: Tensor) -> Tensor:
        prompt = torch.ones(inputs.shape[:2], dtype=torch.bool)
        this_pass = ForwardPass(torch.zeros_like(prompt), prompt, prompt, False, {})
        updated: Tensor = self.routed(torch.zeros_like(inputs), inputs, this_pass)
        return updated


def relative_error(make: Callable[[], nn.Module], seed: int, steps: int = STEPS) -> float:
    """Return the root mean square error on new inputs after training, over the targets' own."""
    teacher, generator = Teacher.drawn(seed), torch.Generator().manual_seed(seed + 100)
    torch.manual_seed(seed)
    model = make()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        inputs, targets = teacher.batch(generator)
        torch.autograd.backward((model(inputs) - targets).square().mean())
        if isinstance(model, OnZeros):
            model.routed.over_steps.end_step(lambda counts: counts)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    inputs, targets = teacher.batch(generator, 2000)
    with torch.no_grad():
        return float((model.eval()(inputs) - targets).norm() / targets.norm())


WAYS: dict[str, Callable[[], nn.Module]] = {
    "LoRA r=4": Lora,
    "frozen routers": lambda: OnZeros(router_grad="none"),
    "learned routers, no balance": OnZeros,
    "balance, 1 pass of 32 rows": lambda: OnZeros(BALANCE),
    "balance over the step, 4 passes of 8 rows": lambda: OnZeros(BALANCE, rows=8),
    "balance over the step, 16 passes of 2 rows": lambda: OnZeros(BALANCE, rows=2),
    "balance over the step, 32 passes of 1 row": lambda: OnZeros(BALANCE, rows=1),
    "balance pass by pass, 4 passes of 8 rows": lambda: OnZeros(BALANCE, rows=8, over_step=False),
    "balance pass by pass, 16 passes of 2 rows": lambda: OnZeros(BALANCE, rows=2, over_step=False),
    "balance pass by pass, 32 passes of 1 row": lambda: OnZeros(BALANCE, rows=1, over_step=False),
}


def run(seeds: int, quick: bool, json_file: Path | None) -> None:
    """Run the measurement and print its table."""
    torch.set_num_threads(1)
    found: dict[str, Sequence[float]] = {}
    for name, make in WAYS.items():
        found[name] = [relative_error(make, seed, 20 if quick else STEPS) for seed in range(seeds)]
    table = table_of("relative error on new inputs", ("", "mean", "each seed"))
    for name, errors in found.items():
        table.add_row(name, f"{sum(errors) / len(errors):.3f}", ", ".join(f"{error:.3f}" for error in errors))
    open_console(160).print(table)
    if json_file is not None:
        write_json(json_file, {"machine": machine(), "errors": found})
