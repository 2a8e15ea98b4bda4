"""Build the models that the MoReS benchmark times; count what MoReS adds to them, and compute it by formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from llava_steering_plugin import Attachment, attach, token_map
from llava_steering_plugin.hooks.scope import entered, opened
from llava_steering_plugin.modes.mores import MoReS

from .shared.beside_frozen import CONTROL, FROZEN
from .shared.frozen_llama import VOCABULARY, Case, clone, frozen_llama, random_embeds, visual_mask


class Variant:
    """A model with its batch: the frozen model, or a clone over the same weights with an adapter."""

    def __init__(self, case: Case, model: LlamaForCausalLM, embeds: Tensor, mode: MoReS | None):
        self.model, self.embeds, self.mode = model, embeds, mode
        self.visual = visual_mask(case)
        self.labels = torch.randint(VOCABULARY, self.visual.shape).masked_fill(self.visual, -100)
        self.token = torch.zeros(case.batch, 1, dtype=torch.long)
        self.attachment: Attachment | None = None
        if mode is not None:
            self.attachment = attach(model, mode)
            with torch.no_grad():
                for parameter in self.attachment.parameters().values():
                    parameter.normal_(0, 0.02)
        with torch.no_grad(), self._told():
            self.cache = model(inputs_embeds=embeds, use_cache=True).past_key_values

    def forward(self) -> None:
        self._set_training(False)
        with torch.no_grad(), self._told():
            self.model(inputs_embeds=self.embeds, use_cache=False)

    def forward_backward(self) -> None:
        self._set_training(True)
        embeds = self.embeds.detach().requires_grad_()
        with self._told():
            self.model(inputs_embeds=embeds, labels=self.labels, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=True)

    def decode(self) -> None:
        """Run one step over the prefill's cache, in the scope that `generate` opens."""
        self._set_training(False)
        with torch.no_grad(), self._generating():
            self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)

    def _set_training(self, training: bool) -> None:
        if self.model.training is not training:
            self.model.train(training)

    @contextmanager
    def _told(self) -> Iterator[None]:
        if self.attachment is None:
            yield
            return
        with token_map(visual=self.visual):
            yield

    @contextmanager
    def _generating(self) -> Iterator[None]:
        if self.attachment is None:
            yield
            return
        with entered(opened(self.attachment, generating=True)):
            yield


def variants(case: Case, settings: tuple[MoReS, ...], dtype: torch.dtype) -> dict[str, Variant]:
    """Return the frozen model, the control and one model for each setting, all over the same weights in memory."""
    model = frozen_llama(case, dtype)
    embeds = random_embeds(case, dtype)
    made = {FROZEN: Variant(case, model, embeds, None)}
    for number, mode in enumerate(settings):
        if number == len(settings) // 2:
            # Half a round after the frozen model, so that the two cover the whole round.
            made[CONTROL] = Variant(case, clone(model), embeds, None)
        made[f"rank {mode.rank}, {mode.tokens} of the tokens"] = Variant(case, clone(model), embeds, mode)
    return made


@dataclass(frozen=True)
class Size:
    """The additions of an adapter: floating-point operations, parameters, buffers, and tensors of width x width."""

    forward_flops: int
    forward_backward_flops: int
    decode_flops: int
    parameters: int
    buffers: int
    square_tensors: int


def size(variant: Variant, attachment: Attachment, flops: list[int], squares: int) -> Size:
    """Count what an adapter adds; `flops` and `squares` are those of the frozen model."""
    forward, both, decode = (mine - frozen for mine, frozen in zip(flops_of(variant), flops, strict=True))
    made = squares_of(variant) - squares
    buffers = sum(buffer.numel() for module in attachment.modules.values() for buffer in module.buffers())
    parameters = sum(parameter.numel() for parameter in attachment.parameters().values())
    return Size(forward, both, decode, parameters, buffers, made)


def expected(case: Case, mode: MoReS) -> Size:
    """Compute the same by formula, for D = width, d = rank, n steered tokens and L layers.

    A forward multiplies n hidden states with M and n updates with R, 2 n D d each; the backward of a product costs
    twice as much. In training the Gram matrices of all layers are computed, 2 d d D each, and the gradient of R becomes
    that of its parameter in three products of 2 d d D. torch counts products only: no solves and no sums.
    """
    wide, rank, layers = case.width, mode.rank, case.layers
    per_image = case.visual if mode.tokens == "all" else max(1, (case.visual + 50) // 100)
    tokens = case.batch * per_image
    forward, gram = 4 * tokens * wide * rank, 2 * rank * rank * wide
    return Size(layers * forward, layers * (3 * forward + 4 * gram), 0, layers * (2 * wide * rank + rank), 0, 0)


def flops_of(variant: Variant) -> list[int]:
    """Return the FLOPs of a forward, a forward + backward and a decode step."""
    counts = []
    for call in (variant.forward, variant.forward_backward, variant.decode):
        call()  # what is kept from one evaluation to the next is there then
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(int(counter.get_total_flops()))
    return counts


class _SquareCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the results of operations whose last two dimensions are both `width`."""

    def __init__(self, width: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = width
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            self.found += int(isinstance(made, Tensor) and made.shape[-2:] == (self.width, self.width))
        return result


def squares_of(variant: Variant) -> int:
    """Return the number of tensors of width x width that a forward + backward makes."""
    with _SquareCounter(variant.embeds.shape[-1]) as counter:
        variant.forward_backward()
    return int(counter.found)
