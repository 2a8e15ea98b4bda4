"""The models that bench_mores.py times, and what MoReS adds to them: counted, and by formula."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import Attachment, attach, token_map
from llava_steering_plugin.hooks.scope import entered, opened
from llava_steering_plugin.modes.mores import MoReS

VOCABULARY = 512  # small, so that the head does not hide what the layers cost
FROZEN, CONTROL = "frozen", "control (frozen again)"


@dataclass(frozen=True)
class Case:
    """One model and one batch: `visual` tokens first, then `text` tokens, in every row."""

    width: int
    intermediate: int
    heads: int
    layers: int
    batch: int
    visual: int
    text: int

    @property
    def positions(self) -> int:
        return self.visual + self.text

    def __str__(self) -> str:
        return f"width {self.width}, {self.layers} layers, batch {self.batch}, {self.visual} + {self.text} tokens"


class Variant:
    """A model with its batch: the frozen one, or a clone over the same weights that carries an adapter."""

    def __init__(self, case: Case, model: LlamaForCausalLM, embeds: Tensor, mode: MoReS | None):
        self.model, self.embeds, self.mode = model, embeds, mode
        self.visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        self.visual[:, : case.visual] = True
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
        with torch.no_grad(), self._told():
            self.model(inputs_embeds=self.embeds, use_cache=False)

    def forward_backward(self) -> None:
        embeds = self.embeds.detach().requires_grad_()
        with self._told():
            self.model(inputs_embeds=embeds, labels=self.labels, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=True)

    def decode(self) -> None:
        """One step over the prefill's cache, in the scope that `generate` opens."""
        with torch.no_grad(), self._generating():
            self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)

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


def frozen_llama(case: Case, dtype: torch.dtype, **settings: Any) -> LlamaForCausalLM:
    """A Llama of the case's shapes with the same random weights every time; `settings` go into its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def clone(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model over the same weights in memory, for another adapter."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def variants(case: Case, settings: tuple[MoReS, ...], dtype: torch.dtype) -> dict[str, Variant]:
    """The frozen model, the control and one model for each setting, all over the same weights in memory."""
    model = frozen_llama(case, dtype)
    embeds = torch.randn(case.batch, case.positions, case.width).to(dtype)
    made = {FROZEN: Variant(case, model, embeds, None)}
    for number, mode in enumerate(settings):
        if number == len(settings) // 2:
            # Half a turn after the first, so that the two enclose what a turn lasts.
            made[CONTROL] = Variant(case, clone(model), embeds, None)
        made[f"rank {mode.rank}, {mode.tokens} of the tokens"] = Variant(case, clone(model), embeds, mode)
    return made


@dataclass(frozen=True)
class Size:
    """What an adapter adds, as counted: floating-point operations, numbers kept, tensors of width x width made."""

    forward_flops: int
    forward_backward_flops: int
    decode_flops: int
    parameters: int
    buffers: int
    square_tensors: int


def size(variant: Variant, attachment: Attachment, flops: list[int], squares: int) -> Size:
    """Counts; `flops` and `squares` are those of the frozen model."""
    forward, both, decode = (mine - frozen for mine, frozen in zip(flops_of(variant), flops, strict=True))
    made = squares_of(variant) - squares
    buffers = sum(buffer.numel() for module in attachment.modules.values() for buffer in module.buffers())
    parameters = sum(parameter.numel() for parameter in attachment.parameters().values())
    return Size(forward, both, decode, parameters, buffers, made)


def expected(case: Case, mode: MoReS) -> Size:
    """The same by formula, for D = width, d = rank, n steered tokens and L layers.

    A forward multiplies n hidden states with M and n updates with R, 2 n D d each, and takes the Gram matrix, 2 d d D.
    The backward of a product costs it twice; beside the three there are the product in the backward of the triangular
    solve, 2 d d D, and the one in that of the Cholesky factor, 2 d d d. torch counts products, so neither the solves
    nor sums are in here.
    """
    wide, rank, layers = case.width, mode.rank, case.layers
    per_image = case.visual if mode.tokens == "all" else max(1, (case.visual + 50) // 100)
    tokens = case.batch * per_image
    forward = 4 * tokens * wide * rank + 2 * rank * rank * wide
    backward = 2 * forward + 2 * rank * rank * wide + 2 * rank**3
    return Size(layers * forward, layers * (forward + backward), 0, layers * (2 * wide * rank + rank), 0, 0)


def flops_of(variant: Variant) -> list[int]:
    """Of a forward, a forward + backward and a decode step."""
    counts = []
    for call in (variant.forward, variant.forward_backward, variant.decode):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(int(counter.get_total_flops()))
    return counts


class _SquareCounter(TorchDispatchMode):
    """Counts the tensors that operations give back whose last two dimensions are both `width`."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.found = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            self.found += isinstance(made, Tensor) and made.shape[-2:] == (self.width, self.width)
        return result


def squares_of(variant: Variant) -> int:
    """Tensors of width x width that a forward + backward makes."""
    with _SquareCounter(variant.embeds.shape[-1]) as counter:
        variant.forward_backward()
    return counter.found
