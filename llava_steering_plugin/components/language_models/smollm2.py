"""SmolLM2 (arXiv 2502.02737): Llama's architecture with small widths, and another tokenizer and template."""

from __future__ import annotations

from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.components.chat_format import ChatFormat, chatml


class SmolLM2(LanguageModel):
    """SmolLM2, and any other model of Llama's architecture whose tokenizer is not Llama's, such as Llama 3.

    Its type is one of its own, because LLaVA loads `llava_llama` with a tokenizer that is treated like Llama's.
    """

    name = "smollm2"
    summary = "SmolLM2, and other models of Llama's architecture with a tokenizer of their own"
    model_type = "llama"
    llava_type = "llava_smollm2"
    version = "smollm2"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return the instruction models' own template."""
        return {"smollm2": chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face")}
