"""Build the models whose launches are counted: frozen, with an adapter, with adapters in a pool, with PEFT's LoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_steering_plugin import AdapterPool, attach, remove_adapter, save_adapter, token_map
from llava_steering_plugin.hooks.owner import ModelOwner, owner_of
from llava_steering_plugin.modes.base import Mode

from .shared.frozen_llama import VOCABULARY, Case, clone, frozen_llama, random_embeds, visual_mask
from .shared.launches import Launches

# Small, because only the number of operations counts; four layers, so that what a pass does once shows as such.
CASE = Case(width=32, intermediate=48, heads=4, layers=4, batch=2, visual=8, text=6)
LORA_RANK = 2
Phases = dict[str, int]
PREFILL, FORWARD, BACKWARD, DECODE = "prefill", "training forward", "backward", "decode step"


class Counted:
    """A model whose passes are counted.

    Args:
        model: with or without an adapter.
        names: the adapters of its rows, where it carries a pool.
    """

    def __init__(self, model: Any, case: Case = CASE, names: list[str] | None = None):
        self.model, self.case, self.names = model, case, names
        self.embeds, self.visual = random_embeds(case, torch.float32), visual_mask(case)
        self.labels = torch.randint(VOCABULARY, self.visual.shape).masked_fill(self.visual, -100)
        self.token = torch.zeros(case.batch, 1, dtype=torch.long)

    def inference(self) -> Phases:
        """Count the operations of a prefill and of a decode step; the second ones, when all that is kept is there."""
        self.model.eval()
        found: Phases = {}
        for _ in range(2):
            with torch.no_grad(), self._generating():
                with Launches() as prefill:
                    cache = self.model(inputs_embeds=self.embeds, use_cache=True).past_key_values
                for _ in range(2):
                    with Launches() as decode:
                        self.model(input_ids=self.token, past_key_values=cache, use_cache=True)
            found = {PREFILL: prefill.total, DECODE: decode.total}
        return found

    def training(self, reentrant: bool | None = None) -> Phases:
        """Count the operations of a training step without an optimizer, the second one.

        Args:
            reentrant: which gradient checkpointing; None: none.
        """
        model = self.model
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found: Phases = {}
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            embeds = self.embeds.detach().requires_grad_()
            with self._told(), Launches() as forward:
                loss = model(inputs_embeds=embeds, labels=self.labels, use_cache=False).loss
            with Launches() as backward:
                loss.backward()
            found = {FORWARD: forward.total, BACKWARD: backward.total}
        model.gradient_checkpointing_disable()
        return found

    def _told(self) -> AbstractContextManager[None]:
        return nullcontext() if owner_of(self.model) is None else token_map(visual=self.visual)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        owner: ModelOwner | None = owner_of(self.model)
        with ExitStack() as stack:
            if owner is not None:
                stack.enter_context(self._told())
                named = {} if self.names is None else {"adapter_names": self.names}
                stack.enter_context(owner._opened((), named, generating=True))
            yield


def frozen(case: Case = CASE) -> Counted:
    """Return the frozen model."""
    return Counted(frozen_llama(case, torch.float32), case)


def adapted(mode: Mode, case: Case = CASE) -> Counted:
    """Return a model with an adapter that is trained."""
    model = frozen_llama(case, torch.float32)
    _drawn(attach(model, mode).parameters().values())
    return Counted(model, case)


def pooled(mode: Mode, count: int, case: Case = CASE) -> Counted:
    """Return a model with `count` adapters in a pool: one for all rows, or one for each of `count` rows."""
    if count > 1:
        case = replace(case, batch=count)
    model = frozen_llama(case, torch.float32)
    donor = clone(model)
    pool = AdapterPool(model)
    names = [f"adapter-{number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            _drawn(attach(donor, mode).parameters().values())
            save_adapter(donor, Path(folder) / name)
            remove_adapter(donor)
            pool.load(name, Path(folder) / name)
    return Counted(model, case, names * case.batch if count == 1 else names)


def with_lora(case: Case = CASE) -> Counted:
    """Return a model with PEFT's LoRA on all linears of the decoder."""
    from peft import LoraConfig, get_peft_model

    model = frozen_llama(case, torch.float32)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in name]
    get_peft_model(model, LoraConfig(r=LORA_RANK, lora_dropout=0.0, target_modules=linears))
    return Counted(model, case)


def hosts_of(mode: Mode, case: Case = CASE) -> list[str]:
    """Return the paths of the layers or linears that a mode works on."""
    return list(attach(frozen_llama(case, torch.float32), mode).modules)


def linears_of(case: Case = CASE) -> int:
    """Return the number of linears in the decoder."""
    return sum(isinstance(part, nn.Linear) for part in frozen_llama(case, torch.float32).model.modules())


def _drawn(parameters: Iterable[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.1)
