"""The template that an export has for vLLM writes the first token of its prompts."""

from __future__ import annotations

import pytest
from vllm_fixtures import Shared

from llava_steering_plugin.components.vllm_template import FILE, with_bos

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


def test_the_template_for_vllm_is_the_other_one_behind_the_first_token(shared: Shared) -> None:
    template = (shared.base / "chat_template.jinja").read_text()
    made = (shared.base / FILE).read_text()
    assert made == with_bos(template) == with_bos(made) != template
    messages = [{"role": "user", "content": "Hello?"}]
    tokenizer = shared.reference.processor.tokenizer
    plain, written = (
        tokenizer.apply_chat_template(messages, chat_template=each, tokenize=False, add_generation_prompt=True)
        for each in (template, made)
    )
    assert written == f"<s>{plain}"
    assert tokenizer(written, add_special_tokens=False).input_ids == tokenizer(plain).input_ids
