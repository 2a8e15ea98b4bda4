"""Language models that the transformers of LLaVA's pin (4.37.2) does not have; the class of each says which has it.

Their templates are those of their tokenizers: `--version tokenizer`.
"""

from __future__ import annotations

from llava_steering_plugin.components.base import LanguageModel


class Gemma(LanguageModel):
    """Gemma (arXiv 2403.08295): widths of heads that are not those of the model, and scaled embeddings."""

    name = "gemma"
    summary = "Gemma"
    model_type = "gemma"
    since = "4.38"


class StableLM(LanguageModel):
    """StableLM (arXiv 2402.17834): layer norms, and rotary positions on a part of each head."""

    name = "stablelm"
    summary = "StableLM"
    model_type = "stablelm"
    since = "4.38"


class Phi3(LanguageModel):
    """Phi-3 (arXiv 2404.14219): one linear for q, k and v, and one for gate and up."""

    name = "phi3"
    summary = "Phi-3"
    model_type = "phi3"
    since = "4.41"


class Qwen3(LanguageModel):
    """Qwen3 (arXiv 2505.09388): norms on queries and keys."""

    name = "qwen3"
    summary = "Qwen3"
    model_type = "qwen3"
    since = "4.51"
