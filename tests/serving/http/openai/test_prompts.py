"""A conversation of the API has the ids with which a training of the same template begins; what is none is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_llava import TinyLlava

from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.schema import Message

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TURNS = [
    ("What color is the circle?", "It is red."),
    ("  What shape is it?\n", "A circle."),
    ("Is it a circle?", "Yes."),
]
# All that adapters can be served with, but those of LLaVA-0, whose training writes another text than its chat.
OF_LLAVA = ("v1", "vicuna_v1", "llava_v1", "llama_2", "llava_llama_2", "mistral_instruct", "mpt", "v1_mmtag")


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def message(role: str, *parts: dict[str, Any]) -> Message:
    return Message.model_validate({"role": role, "content": list(parts)})


def conversation(turns: Sequence[tuple[str, str]], *, image: bool, last: bool) -> list[Message]:
    """The conversation up to its last question, with the image in front of the first one or behind it."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = [text(question)]
        if image and not number:
            parts = [*parts, IMAGE] if last else [IMAGE, *parts]
        messages += [message("user", *parts), message("assistant", text(answer))]
    return messages[:-1]


def sample(turns: Sequence[tuple[str, str]], *, image: bool) -> list[dict[str, str]]:
    """The same as a file of training data has it."""
    said = [{"from": who, "value": each} for turn in turns for who, each in zip(("human", "gpt"), turn, strict=True)]
    if image:
        said[0]["value"] = f"{said[0]['value']}\n<image>"  # LLaVA puts it in front, too
    return said


@pytest.fixture(autouse=True)
def conversations(patched_llava: Path) -> Iterator[Any]:
    from llava import conversation

    before = conversation.default_conversation
    yield conversation
    conversation.default_conversation = before


def written(messages: Sequence[Message], template: str, tokenizer: Any, marked: bool = False) -> list[int]:
    from llava_steering_plugin.serving.http.openai.prompts import write

    return list(write(messages, template, tokenizer, SimpleNamespace(mm_use_im_start_end=marked)).ids)


def trained(conversations: Any, turns: Any, template: str, tokenizer: Any, *, image: bool, marked: bool = False) -> Any:
    """The ids and targets of LLaVA's own training."""
    from llava.train.train import preprocess, preprocess_multimodal

    conversations.default_conversation = conversations.conv_templates[template]
    sources = [sample(turns, image=image)]
    if image:
        sources = preprocess_multimodal(sources, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=marked))
    made = preprocess(sources, tokenizer, has_image=image)
    return made["input_ids"][0].tolist(), made["labels"][0].tolist()


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("template", OF_LLAVA)
def test_the_ids_are_those_of_a_training_with_llavas_own_templates(
    tiny: TinyLlava, conversations: Any, template: str, image: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False, model_max_length=2048)
    tokenizer.pad_token = tokenizer.unk_token
    ids, _ = trained(conversations, TURNS, template, tokenizer, image=image)
    for count in (1, 2, 3):
        for last in (True, False):
            prompt = written(conversation(TURNS[:count], image=image, last=last), template, tokenizer)
            assert ids[: len(prompt)] == prompt and len(prompt) >= 20
            assert prompt.count(-200) == image


def test_several_images_of_a_message_stand_in_front_of_it_each_with_the_marks_of_the_model(
    tiny: TinyLlava, conversations: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False, model_max_length=2048)
    mixed = [message("user", text("Which one"), IMAGE, text("is red?"), IMAGE)]
    assert mixed[0].text == "Which one\nis red?"
    ids = written(mixed, "v1", tokenizer)
    from llava.mm_utils import tokenizer_image_token

    system = conversations.conv_templates["v1"].system
    said = f"{system} USER: <image>\n<image>\nWhich one\nis red? ASSISTANT:"
    assert ids == tokenizer_image_token(said, tokenizer)
    marked = said.replace("<image>", "<im_start><image><im_end>")
    assert written(mixed, "v1", tokenizer, marked=True) == tokenizer_image_token(marked, tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("v1", "Be brief. USER: Hi ASSISTANT:"),
        ("llava_v0", "Be brief.###Human: Hi###Assistant:"),
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("mpt", "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"),
        ("qwen2_5", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("phi", "Be brief. USER: Hi ASSISTANT:"),
    ],
)
def test_a_system_message_takes_the_place_of_the_templates_own(
    tiny: TinyLlava, conversations: Any, template: str, said: str
) -> None:
    from llava.mm_utils import tokenizer_image_token
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False, model_max_length=2048)
    for role in ("system", "developer"):
        messages = [message(role, text("Be brief.")), message("user", text("Hi"))]
        assert written(messages, template, tokenizer) == tokenizer_image_token(said, tokenizer)
    assert "Be brief." not in conversations.conv_templates[template].system


HI, HO = message("user", text("Hi")), message("assistant", text("Ho"))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([HO, HI], "messages[0] is the assistant's; user and assistant speak in turn, the user first"),
        ([HI, HI], "messages[1] is the user's; user and assistant speak in turn"),
        ([HI, HO], "the last message is not the user's"),
        ([message("system", text("x"))], "the last message is not the user's"),
        ([HI, message("system", text("x")), HI], "messages[1] is the system's; that has to be the first one, alone"),
        ([message("user", text("  "))], "messages[0] is empty"),
        ([HI, message("assistant", text("")), HI], "messages[1] is empty"),
        ([HI, message("assistant", text("x"), IMAGE), HI], "messages[1] is the assistant's and holds an image"),
        ([message("user", text("What is <image>?"))], "messages[0] holds the text <image>"),
    ],
)
def test_what_is_no_conversation_is_refused(conversations: Any, messages: list[Message], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        written(messages, "v1", None)
    assert said in refused.value.text and refused.value.status == 400


def test_a_template_without_a_place_for_a_system_message_says_so(conversations: Any) -> None:
    with pytest.raises(ApiError, match="no place for a system message"):
        written([message("system", text("x")), HI], "plain", None)
