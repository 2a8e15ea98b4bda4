"""The texts around turns are read from a chat template, and a template that is no sequence of turns is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from tiny_language_models import ENDS, MISTRAL, NEWER, QWEN2, QWEN2_5, SMOLLM2, Family

from llava_steering_plugin.components.chat_format import ChatFormat, chatml, format_of, read_format
from llava_steering_plugin.components.language_models.newer import Gemma, Phi3, Qwen3, StableLM
from llava_steering_plugin.components.language_models.phi import Phi
from llava_steering_plugin.components.language_models.qwen2 import Qwen2
from llava_steering_plugin.components.language_models.smollm2 import SmolLM2
from llava_steering_plugin.errors import ArgumentsError

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}"
# As Qwen3's: an answer that is learned begins with what its prompt does not ask for.
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q' + m.content }}{% else %}"
    "{{ 'A' + ('<think></think>' if loop.last else '') + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A' }}{% endif %}"
)
ONE_TURN = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}Q{{ messages[0].content }}A"


class Tokenizer(SimpleNamespace):
    """Writes a chat template, and puts its first token before a text if it has one."""

    def __init__(self, template: str | None, bos: str | None = None, eos: str = "</s>", further: tuple[str, ...] = ()):
        super().__init__(
            chat_template=template,
            bos_token=bos,
            bos_token_id=None if bos is None else 1,
            eos_token=eos,
            additional_special_tokens=[],
            added_tokens_decoder={
                number: SimpleNamespace(content=token, special=True) for number, token in enumerate(further)
            },
        )

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[1] * (self.bos_token is not None) + [5])

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        return (
            jinja2.Environment()
            .from_string(self.chat_template)
            .render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token,
            )
        )


@pytest.mark.parametrize(
    ("template", "component", "name"),
    [(QWEN2, Qwen2, "qwen2"), (QWEN2_5, Qwen2, "qwen2_5"), (SMOLLM2, SmolLM2, "smollm2")],
    ids=["qwen2", "qwen2.5", "smollm2"],
)
def test_the_formats_of_our_components_are_those_of_the_models_own_templates(
    template: str, component: Any, name: str
) -> None:
    assert format_of(Tokenizer(template, eos="<|im_end|>"), "a model") == component.formats()[name]


@pytest.mark.parametrize(
    ("family", "component"),
    list(zip(NEWER, (Gemma, StableLM, Phi3, Qwen3), strict=True)),
    ids=[family.name for family in NEWER],
)
def test_so_are_those_of_a_newer_transformers(family: Family, component: Any) -> None:
    """Gemma's tokenizer puts a token before a text; Phi-3's template closes a text with one that ends no turn."""
    bos = "<bos>" if family.name == "gemma" else None
    tokenizer = Tokenizer(family.template, bos, family.tokens.get("eos_token") or "<eos>", family.further)
    assert format_of(tokenizer, "a model") == component.formats()[component.version]


def test_a_thought_that_is_kept_out_stands_in_the_prompt() -> None:
    kept_out = Qwen3.formats()["qwen3_no_thinking"]
    assert kept_out.write([("Who?", None)]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_text_that_only_its_very_end_closes_has_no_end_to_learn() -> None:
    closed = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant' }}{% else %}{{ eos_token }}{% endif %}"
    )
    with pytest.raises(ArgumentsError, match="turns that differ from place to place"):
        format_of(Tokenizer(closed), "a model")


def test_what_an_answer_begins_with_is_the_models_to_say_and_its_end_is_one_token() -> None:
    read = format_of(Tokenizer(MISTRAL, bos="<s>"), "a model")
    assert read == ChatFormat("", "[INST] ", " [/INST]", "</s>", lead=" ")
    read = format_of(Tokenizer(ZEPHYR), "a model")
    assert read == ChatFormat("", "<|user|>\n", "</s>\n<|assistant|>\n", "</s>", between="\n")


def test_the_token_that_a_tokenizer_puts_before_a_text_is_not_written_twice() -> None:
    with_bos = format_of(Tokenizer(LLAMA_2, bos="<s>"), "a model")
    assert with_bos.write([("a", "b"), ("c", None)]) == "[INST] a [/INST] b </s><s>[INST] c [/INST]"
    # A tokenizer without such a token, for which a template's text is only text.
    assert format_of(Tokenizer(LLAMA_2), "a model").write([("a", None)]) == "[INST] a [/INST]"


def test_a_conversation_is_written_turn_by_turn() -> None:
    written = chatml("Be brief.").write([("Who?", "Me."), ("Why?", None)])
    assert written == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        Phi.formats()["phi"]
        .write([("Who?", "Me."), ("Why?", None)])
        .endswith(f"USER: Who? ASSISTANT: Me.{ENDS}USER: Why? ASSISTANT:")
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template, so there is no conversation to read"),
        ("", "has no chat template"),
        (NUMBERED, "turns that differ from place to place"),
        (THINKING, "answers that are no continuation of their prompts"),
        (ONE_TURN, "cannot be read: UndefinedError: 'raise_exception' is undefined"),
        ("{{", "cannot be read: TemplateSyntaxError"),
    ],
)
def test_what_is_no_sequence_of_turns_is_refused_with_the_reason(template: str | None, said: str) -> None:
    with pytest.raises(ArgumentsError, match="some-model") as caught:
        format_of(Tokenizer(template), "some-model")
    assert said in str(caught.value)


def test_a_template_that_leaves_out_what_was_said_has_no_format() -> None:
    assert read_format(lambda messages, answered: "".join(m["role"] for m in messages)) is None
