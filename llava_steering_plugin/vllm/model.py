"""vLLM's LlavaForConditionalGeneration with a place for MoReS behind every decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.lora.utils
from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProjector
from vllm.model_executor.models.vision import get_num_selected_vision_tokens, get_vision_encoder_info

from llava_steering_plugin.vllm.layers import (
    STEERING,
    TOKENS,
    SteeringInSlots,
    SteeringPlace,
    SteeringTokens,
    TokensInSlots,
)
from llava_steering_plugin.vllm.projector import ProjectorInSlots, ProjectorPlace, SteeredProjector
from llava_steering_plugin.vllm.refusals import asked_for, refused
from llava_steering_plugin.vllm.rows_without_lora import leave_rows_without_lora
from llava_steering_plugin.vllm.token_table import with_places, without_places

# Between the two linears that a projector of one linear is exported as: the name that transformers knows, and vLLM's.
NO_ACTIVATION, NO_ACTIVATION_IN_VLLM = "linear", "torch.nn.modules.linear.Identity"
IN_SLOTS = (SteeringInSlots, TokensInSlots, ProjectorInSlots)
# The manager tries these classes in their order on each linear.
if not set(IN_SLOTS) <= set(vllm.lora.utils._all_lora_classes):
    vllm.lora.utils._all_lora_classes = (*IN_SLOTS, *vllm.lora.utils._all_lora_classes)
leave_rows_without_lora()


@contextmanager
def _activation_named_for_vllm(config: Any) -> Iterator[None]:
    """Name a projector's missing activation as vLLM does while it is built. transformers reads the config, too."""
    if (named := config.projector_hidden_act) == NO_ACTIVATION:
        config.projector_hidden_act = NO_ACTIVATION_IN_VLLM
    try:
        yield
    finally:
        if named == NO_ACTIVATION:
            config.projector_hidden_act = named


class SteeredDecoderLayer(LlamaDecoderLayer):
    """A decoder layer whose output goes through its child `steering`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        hidden, residual = super().forward(*args, **kwargs)
        steered: tuple[Tensor, Tensor] = self.steering(hidden, residual)
        return steered


class SteeredLlava(LlavaForConditionalGeneration):
    """Is vLLM's own class where LoRA is off, or where something in the engine's settings excludes MoReS."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        with _activation_named_for_vllm(vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.steered = False
        if vllm_config.lora_config is None:
            return
        problems = [*refused(vllm_config), *self._wrong_layers()]
        if problems:
            if asked_for(vllm_config):
                raise ValueError("MoReS adapters cannot run in this engine: " + "; ".join(problems))
            return
        self._make_places(vllm_config.scheduler_config.max_num_batched_tokens)
        projector = self.multi_modal_projector  # another where the engine takes no images
        if vllm_config.lora_config.enable_tower_connector_lora and type(projector) is LlavaMultiModalProjector:
            projector.add_module(STEERING, ProjectorPlace(projector, next(projector.parameters()).device))
            projector.__class__ = SteeredProjector

    def _wrong_layers(self) -> list[str]:
        kinds = {type(layer) for layer in self.language_model.model.layers} - {LlamaDecoderLayer}
        return [f"its decoder has layers of the class {kind.__name__}, not Llama's" for kind in kinds]

    def _make_places(self, most_tokens: int) -> None:
        width, decoder = self.config.text_config.hidden_size, self.language_model.model
        device = next(decoder.parameters()).device
        tokens = SteeringTokens(width, -(-most_tokens // 8) * 8, device)
        self.language_model.add_module(TOKENS, tokens)
        for layer in decoder.layers:
            layer.add_module(STEERING, SteeringPlace(tokens, width, device))
            # vLLM builds the decoder by its name, with no way to say of which layers. Hooks would not be compiled.
            layer.__class__ = SteeredDecoderLayer
        self.steered = True

    def get_mm_lora_token_counts(self, *, num_mm_embeds: int, **kwargs: Any) -> tuple[int, int | None]:
        """Return how many tokens the tower and the projector compute for some image features.

        vLLM's Llava counts none that the tower computes and does not hand on: LoRAs at the tower's linears would fail.
        """
        if not self.steered:
            found: tuple[int, int | None] = super().get_mm_lora_token_counts(num_mm_embeds=num_mm_embeds, **kwargs)
            return found
        side, strategy = self.config.vision_config.image_size, self.config.vision_feature_select_strategy
        whole = get_vision_encoder_info(self.config).get_num_image_tokens(image_width=side, image_height=side)
        kept = get_num_selected_vision_tokens(whole, strategy)
        return -(-num_mm_embeds // kept) * whole, num_mm_embeds

    def embed_multimodal(self, **kwargs: object) -> Any:
        found = super().embed_multimodal(**kwargs)
        return tuple(with_places(each) for each in found) if self.steered else found

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        if self.steered:
            digits = None
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                parts = [without_places(each) for each in multimodal_embeddings]
                multimodal_embeddings = [features for features, _ in parts]
                digits = torch.cat([each for _, each in parts])
            tokens: nn.Module = self.language_model.get_submodule(TOKENS)
            if isinstance(tokens, TokensInSlots):
                tokens.find(digits, is_multimodal)
        embeds: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        return embeds
