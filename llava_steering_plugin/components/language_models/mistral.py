"""Mistral 7B (arXiv 2310.06825): grouped keys and a sliding window. LLaVA loads it, and trains it as a Llama."""

from __future__ import annotations

from llava_steering_plugin.components.base import LanguageModel


class Mistral(LanguageModel):
    """Mistral 7B, in LLaVA's own class; its template is LLaVA's mistral_instruct."""

    name = "mistral"
    summary = "Mistral 7B"
    model_type = "mistral"
    llava_type = "llava_mistral"
    version = "mistral_instruct"
