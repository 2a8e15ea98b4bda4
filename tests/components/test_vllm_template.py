"""The chat template for vLLM writes the first token of a prompt itself, once. In vLLM: tests/vllm/test_server.py."""

from __future__ import annotations

import jinja2
from llava.conversation import conv_templates

from llava_steering_plugin.components.chat_template import chat_template
from llava_steering_plugin.components.vllm_template import with_bos


def test_the_first_token_is_written_once_in_front_of_the_prompt() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]}]
    for name in ("vicuna_v1", "llava_llama_2", "mpt"):
        template = chat_template(conv_templates[name])
        texts = [
            jinja2.Template(each).render(messages=messages, add_generation_prompt=True, bos_token="<s>")
            for each in (template, with_bos(template), with_bos(with_bos(template)))
        ]
        assert texts[1] == texts[2] == f"<s>{texts[0]}"
