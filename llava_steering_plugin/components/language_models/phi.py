"""Phi-1, Phi-1.5 and Phi-2: attention beside the MLP after one layer norm, rotary positions on a part of each head."""

from __future__ import annotations

from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.components.chat_format import ChatFormat


class Phi(LanguageModel):
    """Phi-2, the smaller model of the LLaVA Steering paper; it has no chat template of its own."""

    name = "phi"
    summary = "Phi-1, Phi-1.5 and Phi-2"
    model_type = "phi"
    llava_type = "llava_phi"
    version = "phi"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return LLaVA-1.5's prompts with Phi's token for an end, as LLaVA-Phi and TinyLLaVA train it."""
        system = (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        )
        return {"phi": ChatFormat(system, "USER: ", " ASSISTANT:", "<|endoftext|>", lead=" ")}
