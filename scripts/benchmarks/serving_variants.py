"""Build what the serving benchmark compares: a plain model, and clones over its weights with 1 to 1,000 adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from llava_steering_plugin import AdapterPool, attach, remove, save_adapter, token_map
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

from .shared.frozen_llama import Case, clone, frozen_llama, random_embeds, visual_mask
from .shared.process_memory import in_use

BASE, CONTROL = "base", "control (base again)"
# MixLoRA and LoRA work on two linears of every layer, so that a thousand adapters fit into memory.
TARGETS = ("q_proj", "v_proj")
LORA_RANK = 8
MODES: dict[str, Mode] = {
    "MoReS": MoReS(rank=1, tokens="1%"),
    "MixLoRA": MixLoRA(factors=4, rank=2, targets=",".join(TARGETS)),
}
PEFT = "PEFT LoRA"
# Distance between the adapters of two generations: large enough that no cache holds the next one's weights.
STRIDE = 379


class _Passes(LogitsProcessor):
    """Record the end of each pass of a generation."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.ends = clock, list[float]()

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.ends.append(self.clock())
        return scores


@dataclass(frozen=True)
class Memory:
    """Memory of one adapter, in bytes: its tensors, and the growth of the process."""

    tensors: float
    process: float


class Variant:
    """A model that generates with one of its adapters, with another one each time."""

    memory: Memory | None = None

    def __init__(self, case: Case, model: Any, embeds: Tensor, count: int = 0):
        self.case, self.model, self.embeds, self.count = case, model, embeds, count
        self.generations = 0
        self.visual = visual_mask(case)

    def adapter(self) -> str:
        """Return the adapter of the next generation."""
        return f"adapter-{self.generations * STRIDE % max(1, self.count)}"

    def generate(self, steps: int, clock: Callable[[], float]) -> tuple[float, float]:
        """Return the seconds of the prefill, and of a decode step in the mean of `steps`."""
        self.generations += 1
        passes = _Passes(clock)
        with torch.inference_mode(), self._selected() as selected:
            start = clock()
            self._generate(self.embeds, steps, passes, **selected)
        return passes.ends[0] - start, (passes.ends[-1] - passes.ends[0]) / steps

    def generate_together(self, rows: int, steps: int, clock: Callable[[], float]) -> float:
        """Return the seconds of `rows` generations in one batch, each row with an adapter of its own."""
        passes = _Passes(clock)
        selected = {"adapter_names": [f"adapter-{row % self.count}" for row in range(rows)]} if self.count else {}
        with torch.inference_mode(), token_map(visual=self.visual.repeat(rows, 1)):
            start = clock()
            self._generate(self.embeds.repeat(rows, 1, 1), steps, passes, **selected)
        return passes.ends[-1] - start

    def _generate(self, embeds: Tensor, steps: int, passes: _Passes, **selected: Any) -> None:
        self.model.generate(
            inputs_embeds=embeds,
            max_new_tokens=steps + 1,
            do_sample=False,
            logits_processor=LogitsProcessorList([passes]),
            **selected,
        )

    @contextmanager
    def _selected(self) -> Iterator[dict[str, Any]]:
        yield {}

    def switch(self) -> float:
        """Return the seconds that the selection of another adapter takes; 0 without adapters."""
        return 0.0


class Pooled(Variant):
    """An `AdapterPool` with `count` adapters of one mode."""

    def __init__(self, case: Case, model: Any, embeds: Tensor, count: int, folder: Path):
        super().__init__(case, model, embeds, count)
        self.pool = AdapterPool(model)
        before = in_use(cuda=False)
        for number in range(count):
            self.pool.load(f"adapter-{number}", folder)
        grown = in_use(cuda=False) - before
        self.memory = Memory(self.pool.details("adapter-0").bytes, grown / count)

    @contextmanager
    def _selected(self) -> Iterator[dict[str, Any]]:
        with token_map(visual=self.visual):
            yield {"adapter_names": self.adapter()}

    def switch(self) -> float:
        """Time what a generation does with an adapter's name: find the adapter, hold it and release it."""
        self.generations += 1
        arguments = {"adapter_names": self.adapter()}
        start = time.perf_counter()
        with self.pool._opened((), arguments, generating=True):
            pass
        return time.perf_counter() - start


class Peft(Variant):
    """PEFT's LoRA: `count` unmerged adapters in one model; `set_adapter` selects one for the whole model."""

    model: PeftModel

    def __init__(self, case: Case, model: Any, embeds: Tensor, count: int):
        before = in_use(cuda=False)
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(TARGETS))
        wrapped = get_peft_model(model, config, "adapter-0")
        for number in range(1, count):
            wrapped.add_adapter(f"adapter-{number}", config)
        super().__init__(case, wrapped.eval(), embeds, count)
        weights = [value for name, value in wrapped.named_parameters() if "lora_" in name]
        grown = in_use(cuda=False) - before
        with torch.no_grad():
            for value in weights:
                value.normal_(0, 0.02)
        self.memory = Memory(sum(value.nbytes for value in weights) / count, grown / count)

    @contextmanager
    def _selected(self) -> Iterator[dict[str, Any]]:
        self.model.set_adapter(self.adapter())
        yield {}

    def switch(self) -> float:
        self.generations += 1
        start = time.perf_counter()
        self.model.set_adapter(self.adapter())
        return time.perf_counter() - start


def variants(case: Case, kinds: dict[str, tuple[int, ...]], dtype: torch.dtype, scratch: Path) -> dict[str, Variant]:
    """Return the plain base, one variant for each kind and count, and the control in their middle.

    Args:
        kinds: numbers of adapters, by `MODES` or `PEFT`.
        scratch: folder for the adapters that pools load.
    """
    model = frozen_llama(case, dtype, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    embeds = random_embeds(case, dtype)
    wanted = [(kind, count) for kind, counts in kinds.items() for count in counts]
    made: dict[str, Variant] = {BASE: Variant(case, model, embeds)}
    for number, (kind, count) in enumerate(wanted):
        if number == len(wanted) // 2:
            # Half a round after the base, so that the two cover the whole round.
            made[CONTROL] = Variant(case, clone(model), embeds)
        name = f"{kind}, {count:,} resident"
        if kind == PEFT:
            made[name] = Peft(case, clone(model), embeds, count)
        else:
            folder = scratch / kind
            if not folder.exists():
                _save(clone(model), MODES[kind], folder)
            made[name] = Pooled(case, clone(model), embeds, count, folder)
    return made


def _save(model: LlamaForCausalLM, mode: Mode, folder: Path) -> None:
    attachment = attach(model, mode)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.normal_(0, 0.02)
    save_adapter(model, folder)
    remove(model)
