"""The layers that vLLM's LoRA manager swaps: weightless linears in the model, and what takes their places.

A LoRA of vLLM's belongs to a linear, so what an adapter does is told as two linears: `steering` in every decoder layer,
and one `steering_tokens` beside the decoder. Their "LoRA" is an adapter's parameters, in one slot for each adapter of a
batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from llava_steering_plugin.vllm.refusals import TARGETS
from llava_steering_plugin.vllm.token_table import SELECTIONS, TERMS, selected

if current_platform.is_cuda():
    from llava_steering_plugin.vllm.steering_kernel import steer
else:
    from llava_steering_plugin.vllm.steering_op import steer

STEERING, TOKENS = TARGETS


def _nothing(
    hidden: Tensor,
    residual: Tensor,
    slots: Tensor,
    chosen: Tensor,
    wanted: Tensor,
    shift: Tensor,
    offset: Tensor,
    basis: Tensor,
    ranks: Tensor,
) -> None:
    """Do on meta tensors what `steer` does."""


# One operator for torch.compile, which looks into none.
direct_register_custom_op("llava_steer", steer, mutates_args=["hidden", "residual"], fake_impl=_nothing)


class Weightless(LinearBase):
    """A linear that holds nothing, so that there is something for the LoRA manager to swap.

    Args:
        width: D.
        device: of the model.
    """

    def __init__(self, width: int, name: str, device: torch.device):
        super().__init__(width, width, prefix=name, disable_tp=True)
        self.quant_method = None  # there are no weights to process
        self.register_parameter("bias", None)
        self.device = device


class SteeringTokens(Weightless):
    """Stands beside the decoder.

    Attributes:
        slots, chosen: of the tokens of the batch, as `steering_op.steer` takes them. All layers read the same tensors,
            which stay in place: a CUDA graph has their addresses.
    """

    def __init__(self, width: int, most_tokens: int, device: torch.device):
        super().__init__(width, TOKENS, device)
        self.slots = torch.full((most_tokens,), -1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(most_tokens, dtype=torch.int64, device=device)

    def forward(self) -> None:
        """Do nothing: `TokensInSlots` is not called in a pass either."""


class SteeringPlace(Weightless):
    """Stands at the end of a decoder layer, and returns the layer's output as it is."""

    def __init__(self, tokens: SteeringTokens, width: int, device: torch.device):
        super().__init__(width, STEERING, device)
        self.shared = (tokens,)  # in a tuple, or it would be a submodule of every layer

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, residual


def packed(shift: Tensor, offset: Tensor, number: int) -> Tensor:
    """Return one tensor [rank, D + 2] of a layer's M, b and the number of its selection, as a LoRA's A."""
    return torch.cat([shift, offset[:, None], torch.full_like(offset, float(number))[:, None]], 1)


class InSlots(BaseLayerWithLoRA):
    """Stands where a weightless linear stood, with what adapters bring in as many slots.

    Attributes:
        replaces: the class of that linear.
    """

    replaces: ClassVar[type[Weightless]]

    def __init__(self, base_layer: Any):
        super().__init__()
        self.base_layer = base_layer

    # The manager asks for the sizes of a LoRA with which it warms up.
    @property
    def lora_a_stacked(self) -> tuple[Tensor, ...]:
        return (torch.zeros(1, 1, 1, 1),)

    @property
    def lora_b_stacked(self) -> tuple[Tensor, ...]:
        return (torch.zeros(1, 1, 1, 1),)

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        return isinstance(source_layer, cls.replaces)


class SteeringInSlots(InSlots):
    """Steers the output of a decoder layer, with the parameters of as many adapters as there are slots."""

    replaces = SteeringPlace

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        width, rank, device = self.base_layer.input_size, lora_config.max_lora_rank, self.base_layer.device
        self.shift = torch.zeros(max_loras, rank, width, dtype=torch.float32, device=device)
        self.basis = torch.zeros_like(self.shift)
        self.offset = torch.zeros(max_loras, rank, dtype=torch.float32, device=device)
        self.ranks = torch.zeros(max_loras, dtype=torch.int64, device=device)
        self.wanted = torch.zeros_like(self.ranks)

    @property
    def lora_a_stacked(self) -> tuple[Tensor, ...]:
        return (self.shift[:, None],)

    @property
    def lora_b_stacked(self) -> tuple[Tensor, ...]:
        return (self.basis.transpose(1, 2)[:, None],)

    def reset_lora(self, index: int) -> None:
        for tensor in (self.wanted, self.ranks, self.shift, self.offset, self.basis):
            tensor[index] = 0

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        self.reset_lora(index)
        width, rank = self.base_layer.input_size, len(lora_a)
        if lora_a.shape[1] != width + 2:
            return  # the LoRA of the warm-up
        self.shift[index, :rank].copy_(lora_a[:, :width])
        self.offset[index, :rank].copy_(lora_a[:, width])
        self.basis[index, :rank].copy_(lora_b.T)
        self.ranks[index] = rank
        self.wanted[index] = 1 << int(lora_a[0, width + 1])

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.base_layer.shared[0]
        torch.ops.vllm.llava_steer(
            hidden,
            residual,
            tokens.slots,
            tokens.chosen,
            self.wanted,
            self.shift,
            self.offset,
            self.basis,
            self.ranks,
        )
        return hidden, residual


class TokensInSlots(InSlots):
    """Finds the tokens that each adapter of a batch steers, by its table of selections."""

    replaces = SteeringTokens

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        self.tables = torch.zeros(max_loras, SELECTIONS, TERMS, 2, dtype=torch.int64, device=self.base_layer.device)

    def reset_lora(self, index: int) -> None:
        self.tables[index] = 0

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        self.reset_lora(index)
        if lora_a.shape == self.tables.shape[1:]:
            self.tables[index].copy_(lora_a)

    def find(self, digits: Tensor | None, is_image: Tensor | None) -> None:
        """Write which tokens of the next pass are steered, and by which slots.

        Args:
            digits: [image tokens, DIGITS], of those in the pass, in their order; None: there are none.
            is_image: bool [tokens], where they are.
        """
        slots, chosen = self.base_layer.slots, self.base_layer.chosen
        slots.fill_(-1)
        if digits is None or is_image is None:
            return
        where = is_image.nonzero().flatten().to(slots.device)
        if len(where) != len(digits):
            raise RuntimeError(f"vLLM gives {len(digits)} image features for {len(where)} image tokens")
        slot = self.punica_wrapper.token_lora_indices[where]
        bits = selected(self.tables[slot.clamp(min=0)], digits)
        chosen[where] = bits
        slots[where] = torch.where(bits != 0, slot, -1)
