"""Attach what the GPU check compares to a model, and remove it again: nothing, the tuning modes, PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_steering_plugin import attach, remove

FROZEN = "frozen"


@dataclass(frozen=True)
class Variant:
    """A name, and the function that attaches it to a model and returns the function that removes it."""

    name: str
    put: Callable[[Any], Callable[[], object]]

    @contextmanager
    def on(self, model: Any) -> Iterator[list[nn.Parameter]]:
        """Attach it inside the block; yield the parameters that it trains."""
        take_off = self.put(model)
        try:
            yield [parameter for parameter in model.parameters() if parameter.requires_grad]
        finally:
            take_off()
            model.requires_grad_(False)


def _nothing(model: Any) -> Callable[[], object]:
    return lambda: None


def _mode(name: str, **settings: Any) -> Callable[[Any], Callable[[], object]]:
    def put(model: Any) -> Callable[[], object]:
        attachment = attach(model, name, **settings)
        for parameter in attachment.trained().values():
            parameter.requires_grad_(True)
        return lambda: remove(model)

    return put


def _lora(rank: int) -> Callable[[Any], Callable[[], object]]:
    """Attach LoRA to every linear of the decoder, as upstream's --lora_enable does."""

    def put(model: Any) -> Callable[[], object]:
        from peft import LoraConfig, get_peft_model

        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name and "vision_tower" not in name
        ]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, task_type="CAUSAL_LM")
        unload: Callable[[], object] = get_peft_model(model, config).unload
        return unload

    return put


def variants(ranks: tuple[int, ...]) -> list[Variant]:
    """Return all variants, the frozen model first."""
    return [
        Variant(FROZEN, _nothing),
        Variant("MoReS r=1, 1%", _mode("mores", rank=1, tokens="1%")),
        Variant("MoReS r=4, all", _mode("mores", rank=4, tokens="all")),
        Variant("MixLoRA E=16, r=4", _mode("mixlora")),
        *(Variant(f"LoRA r={rank}", _lora(rank)) for rank in ranks),
    ]
