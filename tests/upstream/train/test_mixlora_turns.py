"""From which tokens MixLoRA chooses: in upstream's own training samples, and in chats made of the same conversation."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from steered import IMAGE, pictures, strengthen
from tiny_llava import TinyLlava
from torch import Tensor
from training_runs import upstream_globals_restored

from llava_steering_plugin import attach
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.mixlora import MixLoRA

pytest_plugins = ["steered_fixtures"]

Choices = dict[str, list[list[int]]]


@pytest.fixture
def tokenizer(tiny: TinyLlava) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token  # as upstream's train() does
    return tokenizer


@pytest.fixture
def routed(model: Any) -> Attachment:
    return strengthen(attach(model, MixLoRA(factors=8, rank=2, targets="q_proj,up_proj")))


@pytest.fixture(scope="module")
def conversation(tiny: TinyLlava) -> list[dict[str, str]]:
    """Three questions about one image."""
    samples = json.loads(tiny.data.read_text())
    return next(sample["conversations"] for sample in samples if len(sample["conversations"]) == 6)


@contextmanager
def chosen(attachment: Attachment) -> Iterator[list[Choices]]:
    """The A and B factors of the first row, by linear, pass by pass."""
    passes: list[Choices] = []

    def note(module: Any, args: Any, output: Any, path: str) -> None:
        if not passes or path in passes[-1]:
            passes.append({})
        kept = args[2].kept[module]
        passes[-1][path] = [kept.a[0].tolist(), kept.b[0].tolist()]

    handles = [
        module.register_forward_hook(lambda *call, path=path: note(*call, path))
        for path, module in attachment.modules.items()
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def trained(attachment: Attachment, tokenizer: Any, conversation: list[dict[str, str]], template: str) -> Choices:
    """The choice in training, for upstream's own tokens and labels of the conversation."""
    from llava import conversation as templates
    from llava.train.train import DataArguments, preprocess, preprocess_multimodal

    arguments = DataArguments()
    arguments.is_multimodal, arguments.mm_use_im_start_end = True, False
    with upstream_globals_restored():
        templates.default_conversation = templates.conv_templates[template]
        sample = preprocess(preprocess_multimodal([conversation], arguments), tokenizer, has_image=True)
    with chosen(attachment) as passes:
        attachment.model(**sample, images=pictures(1)).loss.backward()
    assert len(passes) == 1
    return passes[0]


def asked(
    attachment: Attachment, tokenizer: Any, conversation: list[dict[str, str]], turn: int, template: str
) -> list[Choices]:
    """The choices in a chat that has come to question number `turn`, from 0, pass by pass."""
    with chosen(attachment) as passes:
        answer(attachment.model, chat(tokenizer, conversation, turn, template))
    return passes


def chat(tokenizer: Any, conversation: list[dict[str, str]], turn: int, template: str) -> Tensor:
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    told = conv_templates[template].copy()
    for number, said in enumerate(conversation[: 2 * turn + 1]):
        told.append_message(told.roles[number % 2], said["value"])
    told.append_message(told.roles[1], None)
    ids: Tensor = tokenizer_image_token(told.get_prompt(), tokenizer, IMAGE, return_tensors="pt")
    return ids[None]


def answer(model: Any, ids: Tensor, **how: Any) -> list[int]:
    length = {"max_new_tokens": 4, "min_new_tokens": 4}
    with torch.inference_mode():
        output: Tensor = model.generate(ids, images=pictures(1), do_sample=False, **length, **how)
    return output[0].tolist()


@pytest.mark.parametrize("template", ["v1", "llava_llama_2"])
def test_a_question_is_routed_alike_in_upstreams_training_and_in_a_chat(
    routed: Attachment, tokenizer: Any, conversation: list[dict[str, str]], template: str
) -> None:
    in_training = trained(routed, tokenizer, conversation[:2], template)
    in_chat = asked(routed, tokenizer, conversation, 0, template)
    assert all(step == in_training for step in in_chat) and len(in_chat) == 4
    other = [{**conversation[0], "value": "<image>\nHow many sides does a circle have?"}]
    assert asked(routed, tokenizer, other, 0, template)[0] != in_training, "any question would be routed so"


def test_a_conversation_is_trained_by_its_first_question_and_a_later_one_is_routed_by_all_that_was_said(
    routed: Attachment, tokenizer: Any, conversation: list[dict[str, str]]
) -> None:
    whole = trained(routed, tokenizer, conversation, "v1")
    assert whole == trained(routed, tokenizer, conversation[:2], "v1")
    turns = [asked(routed, tokenizer, conversation, turn, "v1")[0] for turn in (0, 1, 2)]
    assert turns[0] == whole
    assert turns[1] != whole and turns[2] != turns[1]
    # A later question as training sees it: an answer that ends a prompt in which other answers stand.
    assert turns[2] == trained_on_last(routed, tokenizer, conversation)


def trained_on_last(attachment: Attachment, tokenizer: Any, conversation: list[dict[str, str]]) -> Choices:
    """The choice in training where the last answer alone is supervised."""
    ids = chat(tokenizer, conversation, 2, "v1")
    labels = torch.full_like(ids, -100)
    ids, labels = torch.cat([ids, ids[:, -1:]], 1), torch.cat([labels, ids[:, -1:]], 1)
    with chosen(attachment) as passes:
        attachment.model(input_ids=ids, labels=labels, images=pictures(1))
    return passes[0]


def test_a_streamed_answer_from_a_thread_of_its_own_is_the_same_as_the_model_worker_sends_it(
    routed: Attachment, tokenizer: Any, conversation: list[dict[str, str]]
) -> None:
    from transformers import TextIteratorStreamer

    ids = chat(tokenizer, conversation, 0, "v1")
    expected = tokenizer.decode(answer(routed.model, ids), skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=answer, args=(routed.model, ids), kwargs={"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join(timeout=60)
    assert streamed.strip() == expected.strip() != ""
