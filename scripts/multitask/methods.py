"""What is compared, in numbers: the full measurement and the quick one that CI makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Of every linear of the decoder: MixLoRA has FACTORS in each pool and uses ACTIVE of them for a question.
FACTORS, ACTIVE = 8, 2
# The update is multiplied by this, whatever the method and the rank.
SCALE = 2.0
# Of the load-balance loss, where there is one: what served learning best on the problem of docs/multitask.md.
BALANCE = 0.05


@dataclass(frozen=True)
class Method:
    """One way to tune: a name, upstream's flags for it, and what it trains."""

    slug: str
    name: str
    flags: dict[str, object]
    learning_rate: float

    @property
    def is_lora(self) -> bool:
        return "lora_enable" in self.flags

    @property
    def frozen_routers(self) -> bool:
        return self.flags.get("mixlora_router_grad") == "none"


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of the measurement.

    Attributes:
        samples: training questions of each task.
        questions: test questions of each task.
        steps: training steps, of `batch` questions each.
        seeds: every method is trained with each of them.
        without: methods that are left out, by the names of their folders.
    """

    samples: int = 2500
    questions: int = 200
    steps: int = 300
    batch: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    learning_rate: float = 2e-3
    without: tuple[str, ...] = ()

    def methods(self, layers: int, width: int) -> tuple[Method, ...]:
        """What is compared, on a Llama decoder of that many layers and that width."""
        methods = compared(layers, width, self.learning_rate)
        return tuple(method for method in methods if method.slug not in self.without)


def lora_parameters(rank: int, linears: Iterable[tuple[int, int]]) -> int:
    """Trained parameters of LoRA on `linears`, (in, out) features each."""
    return sum(rank * (wide + out) for wide, out in linears)


def mixlora_parameters(factors: int, active: int, linears: Iterable[tuple[int, int]]) -> int:
    """Trained parameters of MixLoRA with conditional selection and routers that learn."""
    return sum(factors * (wide + out) + (2 + active) * factors * wide for wide, out in linears)


def matching_rank(parameters: int, linears: Iterable[tuple[int, int]]) -> int:
    """The rank at which LoRA trains about as many `parameters`."""
    return round(parameters / lora_parameters(1, linears))


def linears(layers: int, width: int) -> list[tuple[int, int]]:
    """(in, out) features of all linears of a Llama decoder whose MLP is 4 times as wide as its trunk."""
    return layers * [*4 * [(width, width)], *2 * [(width, 4 * width)], (4 * width, width)]


def compared(layers: int, width: int, learning_rate: float) -> tuple[Method, ...]:
    """LoRA of equal active rank and of equal trained parameters; MixLoRA with frozen and with learning routers.

    Those learn from the answers alone, and with the load-balance loss beside them.
    """
    decoder = linears(layers, width)
    equal = matching_rank(mixlora_parameters(FACTORS, ACTIVE, decoder), decoder)

    def lora(rank: int) -> Method:
        flags = {"lora_enable": True, "lora_r": rank, "lora_alpha": round(SCALE * rank), "lora_dropout": 0.0}
        return Method(f"lora-r{rank}", f"LoRA r={rank}", flags, learning_rate)

    def mixlora(name: str, router_grad: str, **more: object) -> Method:
        flags = {
            "tuning_mode": "mixlora",
            "mixlora_factors": FACTORS,
            "mixlora_rank": ACTIVE,
            "mixlora_alpha": SCALE * ACTIVE,
            "mixlora_variant": "paper",
            "mixlora_router_grad": router_grad,
            **more,
        }
        return Method(f"mixlora-{name}", f"MixLoRA {ACTIVE} of {FACTORS}, {name} routers", flags, learning_rate)

    return (
        lora(ACTIVE),
        lora(equal),
        mixlora("frozen", "none"),
        mixlora("learned", "straight_through", mixlora_balance=0.0),
        mixlora("balanced", "straight_through", mixlora_balance=BALANCE),
    )


FULL = Plan()
# Long enough to run everything, too short to learn anything. Routers that learn are in it once.
QUICK = Plan(samples=20, questions=4, steps=4, batch=8, seeds=(1,), without=("mixlora-learned",))
