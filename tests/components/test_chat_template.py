"""Chat templates made of LLaVA's conversation templates (`components/chat_template.py`) write the same prompts."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from llava_steering_plugin.components.chat_template import chat_template
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.export.verification import DIALOGUES, messages_of, prompt_of

ALIKE = ["v0", "v1", "llama_2", "mistral_instruct", "chatml_direct", "llava_v0", "llava_v1", "llava_llama_2", "mpt"]


def render(template: str, messages: list[dict[str, object]]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    written = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return str(written)


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", ALIKE)
def test_a_prompt_is_llavas_letter_by_letter(name: str, dialogue: str) -> None:
    from llava.conversation import conv_templates

    template = chat_template(conv_templates[name])
    prompt = prompt_of(conv_templates[name], DIALOGUES[dialogue], "<image>")
    assert render(template, messages_of(DIALOGUES[dialogue])) == prompt


def test_a_system_message_takes_the_place_of_the_templates() -> None:
    from llava.conversation import conv_templates

    messages = [{"role": "system", "content": 'Say "yes" {{ 1 }}.'}, {"role": "user", "content": "Hello?"}]
    assert render(chat_template(conv_templates["v1"]), messages) == 'Say "yes" {{ 1 }}. USER: Hello? ASSISTANT:'


@pytest.mark.parametrize("name", ["plain", "v1_mmtag", "v0_mmtag"])
def test_templates_that_are_no_chat_are_refused(name: str) -> None:
    from llava.conversation import conv_templates

    with pytest.raises(ArgumentsError, match="cannot be written as a chat template"):
        chat_template(conv_templates[name])
