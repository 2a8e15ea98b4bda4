"""Projectors of adapters' own: each image of a batch is projected by that of the request it belongs to.

With --enable-tower-connector-lora vLLM says of every image feature which slot it belongs to. Like the steering of a
decoder layer, a projector is told as the "LoRA" of a weightless linear, which stands behind the model's own projector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.llava import LlavaMultiModalProjector

from llava_steering_plugin.vllm.layers import STEERING, InSlots, Weightless


class SteeredProjector(LlavaMultiModalProjector):
    """A projector whose output goes through its child `steering`."""

    def forward(self, image_features: Tensor) -> Tensor:
        projected: Tensor = self.steering(image_features, super().forward(image_features))
        return projected


class ProjectorPlace(Weightless):
    """Stands at the end of a projector, and returns its output as it is.

    Args:
        projector: of the model.
    """

    def __init__(self, projector: LlavaMultiModalProjector, device: torch.device):
        super().__init__(projector.linear_1.input_size, STEERING, device)
        self.dtype: torch.dtype = projector.linear_1.params_dtype
        # In a tuple, or they would be submodules here too. The LoRA manager may wrap them in the projector, not here.
        self.parts = (projector.linear_1, projector.act, projector.linear_2)

    def forward(self, features: Tensor, projected: Tensor) -> Tensor:
        return projected


class ProjectorInSlots(InSlots):
    """Projects images of adapters that have a projector of their own, which is one linear of it or both.

    Its parts are cut over the ranks of tensor parallel as the base's are.
    """

    replaces = ProjectorPlace

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        first, _, second = self.base_layer.parts
        like: dict[str, Any] = {"dtype": self.base_layer.dtype, "device": self.base_layer.device}
        inner = second.input_size // second.tp_size
        # Made at once, so that vLLM counts them when it measures how much memory is left.
        self.weights = (
            torch.zeros(max_loras, inner, first.input_size, **like),
            torch.zeros(max_loras, second.output_size, inner, **like),
        )
        self.biases = (
            torch.zeros(max_loras, inner, **like),
            torch.zeros(max_loras, second.output_size, **like),
        )
        # On the host: a batch without such adapters costs nothing.
        self.own = [(False, False)] * max_loras

    def reset_lora(self, index: int) -> None:
        self.own[index] = (False, False)

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        first, _, second = self.base_layer.parts
        self.reset_lora(index)
        own = []
        for number, (given, part) in enumerate(((lora_a, first), (lora_b, second))):
            own.append(given.shape == (part.output_size, part.input_size + 1))  # not so is the LoRA of the warm-up
            if not own[-1]:
                continue
            weight, bias = given[:, :-1], given[:, -1]
            if number == 0:
                weight, bias = (each.chunk(part.tp_size)[part.tp_rank] for each in (weight, bias))
            else:
                weight = weight.chunk(part.tp_size, 1)[part.tp_rank]
            self.weights[number][index].copy_(weight)
            self.biases[number][index].copy_(bias)
        self.own[index] = (own[0], own[1])

    def forward(self, features: Tensor, projected: Tensor) -> Tensor:
        """Replace what the base's projector made of some images.

        Args:
            features: [..., width of the tower], of all images of the pass.
            projected: [..., D], of the same images.
        """
        if not any(map(any, self.own)):
            return projected
        given, found = features.reshape(-1, features.shape[-1]), projected.reshape(-1, projected.shape[-1])
        slots = self.punica_wrapper.token_lora_indices
        if len(slots) != len(given):  # whose they are would be unknown
            raise RuntimeError(f"vLLM names adapters for {len(slots)} image features, and projects {len(given)}")
        for slot, own in enumerate(self.own):
            rows = (slots == slot).nonzero().flatten() if any(own) else ()
            if len(rows):
                found[rows] = self._project(slot, given[rows])
        return found.view_as(projected)

    def _project(self, slot: int, features: Tensor) -> Tensor:
        first, act, second = self.base_layer.parts
        own = self.own[slot]
        states = linear(features, self.weights[0][slot], self.biases[0][slot]) if own[0] else first(features)[0]
        states = act(states)
        if not own[1]:
            projected: Tensor = second(states)[0]
            return projected
        states = linear(states, self.weights[1][slot])
        if second.tp_size > 1:
            states = tensor_model_parallel_all_reduce(states)
        whole: Tensor = states + self.biases[1][slot]
        return whole
