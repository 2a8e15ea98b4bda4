"""Chat templates for vLLM, whose chat route adds no `<s>` to what a template writes: the template has to write it."""

from __future__ import annotations

# What an export has beside the template for processors of transformers, which add it themselves.
FILE = "chat_template_vllm.jinja"


def with_bos(template: str) -> str:
    """Return a chat template that writes the token with which LLaVA's prompts begin, once."""
    return template if "bos_token" in template else "{{ bos_token }}" + template
