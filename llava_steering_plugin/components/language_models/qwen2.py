"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): grouped keys, biases at q, k and v; small ones tie embeddings."""

from __future__ import annotations

from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.components.chat_format import ChatFormat, chatml


class Qwen2(LanguageModel):
    """Qwen2 and Qwen2.5, with the type and class name that FastVLM's checkpoints have."""

    name = "qwen2"
    summary = "Qwen2 and Qwen2.5"
    model_type = "qwen2"
    llava_type = "llava_qwen2"
    other_llava_types = ("llava_qwen",)  # LLaVA-NeXT's
    version = "qwen2_5"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return the two system prompts of the instruction models' own templates.

        The first also has the name under which LLaVA-NeXT's scripts train with it.
        """
        return {
            "qwen2": chatml("You are a helpful assistant."),
            "qwen2_5": chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
            "qwen_1_5": chatml("You are a helpful assistant."),
        }
