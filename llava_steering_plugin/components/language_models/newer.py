"""Language models that the transformers of LLaVA's pin (4.37.2) does not have; the class of each says which has it.

The newest transformers in which LLaVA's train() runs is 4.57.6 (docs/language-models.md).
"""

from __future__ import annotations

from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.components.chat_format import ChatFormat


class Gemma(LanguageModel):
    """Gemma (arXiv 2403.08295): widths of heads that are not those of the model, and scaled embeddings."""

    name = "gemma"
    summary = "Gemma"
    model_type = "gemma"
    since = "4.38"
    version = "gemma"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return the instruction models' own template; it takes no system prompt."""
        asked = "<end_of_turn>\n<start_of_turn>model\n"
        return {"gemma": ChatFormat("", "<start_of_turn>user\n", asked, "<end_of_turn>", "\n")}


class StableLM(LanguageModel):
    """StableLM (arXiv 2402.17834): layer norms, and rotary positions on a part of each head."""

    name = "stablelm"
    summary = "StableLM"
    model_type = "stablelm"
    since = "4.38"
    version = "stablelm"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return the template of StableLM Zephyr 3B and StableLM 2 1.6B; those of 12B are ChatML."""
        asked = "<|endoftext|>\n<|assistant|>\n"
        return {"stablelm": ChatFormat("", "<|user|>\n", asked, "<|endoftext|>", "\n")}


class Phi3(LanguageModel):
    """Phi-3 (arXiv 2404.14219): one linear for q, k and v, and one for gate and up."""

    name = "phi3"
    summary = "Phi-3"
    model_type = "phi3"
    since = "4.41"
    version = "phi3"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return the template of Phi-3 and Phi-3.5, without a system prompt."""
        return {"phi3": ChatFormat("", "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>", "\n")}


class Qwen3(LanguageModel):
    """Qwen3 (arXiv 2505.09388): norms on queries and keys."""

    name = "qwen3"
    summary = "Qwen3"
    model_type = "qwen3"
    since = "4.51"
    version = "qwen3"

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return the template of the models that do not think, and the prompt that keeps others from it.

        The template of those that can think writes turns that differ from place to place: a thought stands in the last
        answer alone.
        """
        ask, asked = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        return {
            "qwen3": ChatFormat("", ask, asked, "<|im_end|>", "\n"),
            "qwen3_no_thinking": ChatFormat("", ask, f"{asked}<think>\n\n</think>\n\n", "<|im_end|>", "\n"),
        }
