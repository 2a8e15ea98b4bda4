"""Define the methods to compare and the sizes of the measurement: the full one, and the quick one for CI."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from experiments.comparing import PROCESSES
from experiments.settings import FULL_BASE, QUICK_BASE, BaseSettings
from experiments.tuning import Tuning, lora

# MixLoRA has FACTORS in each pool of every linear of the decoder, and uses ACTIVE of them for a question.
FACTORS, ACTIVE = 8, 2
# The update is multiplied by this, for every method and rank.
SCALE = 2.0
# Weight of the load-balance loss: the best one on the problem of docs/multitask.md.
BALANCE = 0.05


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of the measurement.

    Attributes:
        base: of the demo's base.
        samples: training questions of each task.
        questions: test questions of each task.
        validation: questions of each task that choose learning rates, on other pictures.
        steps: training steps, of `batch` questions each.
        seeds: every method is trained with each of them.
        rates: the learning rates of which validation chooses one, for every method.
        without: the slugs of methods that are left out.
        diagnosis: questions of each task, for each batch that `llava-steering diagnose` measures.
        processes: how many trainings run at the same time.
    """

    base: BaseSettings = FULL_BASE
    samples: int = 2500
    questions: int = 200
    validation: int = 100
    steps: int = 300
    batch: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    without: tuple[str, ...] = ()
    diagnosis: int = 48
    processes: int = PROCESSES

    def methods(self, layers: int, width: int) -> tuple[Tuning, ...]:
        """Return the methods to compare, on a Llama decoder of `layers` and `width`."""
        methods = compared(layers, width, self.rates)
        return tuple(method for method in methods if method.slug not in self.without)


def lora_parameters(rank: int, linears: Iterable[tuple[int, int]]) -> int:
    """Return the trained parameters of LoRA on `linears`, (in, out) features each."""
    return sum(rank * (wide + out) for wide, out in linears)


def mixlora_parameters(factors: int, active: int, linears: Iterable[tuple[int, int]]) -> int:
    """Return the trained parameters of MixLoRA with conditional selection and routers that learn."""
    return sum(factors * (wide + out) + (2 + active) * factors * wide for wide, out in linears)


def matching_rank(parameters: int, linears: Iterable[tuple[int, int]]) -> int:
    """Return the rank at which LoRA trains about as many `parameters`."""
    return round(parameters / lora_parameters(1, linears))


def linears(layers: int, width: int) -> list[tuple[int, int]]:
    """Return (in, out) features of all linears of a Llama decoder whose MLP is 4 times as wide as its trunk."""
    return layers * [*4 * [(width, width)], *2 * [(width, 4 * width)], (4 * width, width)]


def compared(layers: int, width: int, rates: tuple[float, ...]) -> tuple[Tuning, ...]:
    """Return LoRA of equal active rank and of equal trained parameters, and MixLoRA with frozen and learned routers.

    Learned routers learn from the answers alone, or with the load-balance loss.
    """
    decoder = linears(layers, width)
    equal = matching_rank(mixlora_parameters(FACTORS, ACTIVE, decoder), decoder)

    def mixlora(name: str, router_grad: str, **more: object) -> Tuning:
        flags: dict[str, object] = {
            "tuning_mode": "mixlora",
            "mixlora_factors": FACTORS,
            "mixlora_rank": ACTIVE,
            "mixlora_alpha": SCALE * ACTIVE,
            "mixlora_variant": "paper",
            "mixlora_router_grad": router_grad,
            **more,
        }
        return Tuning(f"mixlora-{name}", f"MixLoRA {ACTIVE} of {FACTORS}, {name} routers", flags, rates)

    return (
        *(lora(f"lora-r{rank}", f"LoRA r={rank}", rank, round(SCALE * rank), rates) for rank in (ACTIVE, equal)),
        mixlora("frozen", "none"),
        mixlora("learned", "straight_through", mixlora_balance=0.0),
        mixlora("balanced", "straight_through", mixlora_balance=BALANCE),
    )


FULL = Settings()
# Long enough to run every part, too short to learn anything. Only one method with learned routers is in it.
QUICK = Settings(
    QUICK_BASE,
    samples=20,
    questions=4,
    validation=2,
    steps=4,
    batch=8,
    seeds=(1,),
    rates=(2e-3,),
    without=("mixlora-learned",),
    diagnosis=2,
)
