"""For every template and tokenizer, a training's ids are a chat's, and its targets are the answers and their ends.

Covers `upstream/text/chat_templates.py` and `upstream/text/tokenizers.py` as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import FAMILIES, Family

from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.upstream.text.chat_templates import OF_TOKENIZER, offer
from llava_steering_plugin.upstream.text.tokenizers import Tokenizers, attend_to_ends, is_prepared, prepared
from llava_steering_plugin.upstream.train.targets import encode, prompt_ids

# Templates that no tokenizer here was made for are written all the same: a user may want them.
OF_LLAVA = ("v1", "llava_v1", "llama_2", "mistral_instruct", "chatml_direct", "mpt")
CASES = [
    pytest.param(family, version, fast, id=f"{family.name}-{version}-{'fast' if fast else 'slow'}")
    for family in FAMILIES
    for version in dict.fromkeys([family.version, *((OF_TOKENIZER,) if family.template else ()), *OF_LLAVA])
    for fast in (True, False)
]
TURNS = [
    ("<image>\nWhat color is the circle?", "It is red."),
    ("What shape is it?", "A circle."),
    ("Is it a circle?", "Yes."),
]


@pytest.fixture(autouse=True)
def conversations(patched_llava: Path) -> Iterator[Any]:
    """LLaVA's templates, as they are before a test."""
    from llava import conversation

    before = conversation.default_conversation
    yield conversation
    conversation.conv_templates.pop(OF_TOKENIZER, None)
    conversation.default_conversation = before


def tokenizer_of(folder: Path, *, fast: bool = True) -> Any:
    from transformers import AutoTokenizer

    return prepared(AutoTokenizer.from_pretrained(folder, use_fast=fast, model_max_length=2048), "some")


def template_of(version: str, tokenizer: Any) -> Any:
    from llava.conversation import conv_templates

    if version == OF_TOKENIZER:
        offer(tokenizer, "the test")
    return conv_templates[version]


def asked(template: Any, turns: list[tuple[str, str]], question: str, tokenizer: Any) -> list[int]:
    """The ids that a chat feeds: LLaVA's own template and its own function."""
    from llava.mm_utils import tokenizer_image_token

    chat = template.copy()
    for earlier in turns:
        for role, said in zip(chat.roles, earlier, strict=True):
            chat.append_message(role, said)
    chat.append_message(chat.roles[0], question)
    chat.append_message(chat.roles[1], None)
    ids: list[int] = tokenizer_image_token(chat.get_prompt(), tokenizer)
    return ids


def sample(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": said} for turn in turns for who, said in zip(("human", "gpt"), turn, strict=True)]


def runs(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Beginning and end of each run of targets."""
    learned = [0, *(labels != IGNORED).int().tolist(), 0]
    edges = [position for position, (a, b) in enumerate(itertools.pairwise(learned)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def end_of(template: Any) -> str:
    return str(template.sep if template.sep_style.name == "MPT" else template.sep2)


@pytest.mark.parametrize(("family", "version", "fast"), CASES)
def test_each_answer_is_learned_behind_the_very_ids_that_a_chat_feeds(
    family: Family, version: str, fast: bool, language_models: dict[str, Path]
) -> None:
    tokenizer = tokenizer_of(language_models[family.name], fast=fast)
    template = template_of(version, tokenizer)
    for turns in (TURNS, TURNS[:1], [(question.removeprefix("<image>\n"), answer) for question, answer in TURNS]):
        ids, labels = encode(sample(turns), template, tokenizer, has_image="<image>" in turns[0][0])
        found = runs(labels)
        assert len(found) == len(turns)
        spoken = [said for turn in turns for said in turn]
        for number, (begin, end) in enumerate(found):
            question, answer = turns[number]
            assert ids[:begin].tolist() == asked(template, turns[:number], question, tokenizer)
            assert ids[:begin].tolist() == prompt_ids(spoken[: 2 * number + 1], template, tokenizer)
            assert torch.equal(labels[begin:end], ids[begin:end])
            learned = tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
            assert learned.replace(" ", "") == (answer + end_of(template)).replace(" ", "")


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.template], ids=lambda each: each.name)
def test_texts_and_ids_are_those_of_the_tokenizers_own_template(
    family: Family, language_models: dict[str, Path]
) -> None:
    tokenizer = tokenizer_of(language_models[family.name])
    turns = [(question.removeprefix("<image>\n"), answer) for question, answer in TURNS]
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
        for turn in sample(turns)
    ]
    template = template_of(OF_TOKENIZER, tokenizer)
    for number in range(3):
        rendered = tokenizer.apply_chat_template(messages[: 2 * number + 1], add_generation_prompt=True)
        assert asked(template, turns[:number], turns[number][0], tokenizer) == rendered
    whole = tokenizer.apply_chat_template(messages)
    ids, labels = encode(sample(turns), template, tokenizer, has_image=False)
    assert whole[: len(ids)] == ids.tolist()
    assert not tokenizer.decode(whole[len(ids) :]).strip()  # a line break before a next turn at most
    assert labels[-1] == tokenizer.eos_token_id


def test_llavas_own_masks_are_off_for_tokenizers_without_a_first_token(
    language_models: dict[str, Path], conversations: Any
) -> None:
    """What `targets` is for: LLaVA takes the first id for one that the tokenizer has added."""
    from llava.train.train import preprocess

    tokenizer = tokenizer_of(language_models["phi"], fast=False)
    conversations.default_conversation = conversations.conv_templates["v1"]
    original, ours = (
        call([sample(TURNS[:1])], tokenizer, has_image=True)["labels"][0]
        for call in (preprocess.__wrapped__, preprocess)
    )
    assert runs(original) != runs(ours)


def test_llamas_tokenizer_goes_llavas_own_way(tiny: Any, conversations: Any) -> None:
    from llava.train.train import preprocess
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llm, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    conversations.default_conversation = conversations.conv_templates["v1"]
    own, ours = (call([sample(TURNS)], tokenizer, has_image=True) for call in (preprocess.__wrapped__, preprocess))
    assert torch.equal(own["labels"], ours["labels"]) and torch.equal(own["input_ids"], ours["input_ids"])
    # And where LLaVA's masks are right, ours are the same.
    assert runs(encode(sample(TURNS), conversations.conv_templates["v1"], tokenizer, has_image=True)[1]) == runs(
        own["labels"][0]
    )


def test_what_a_tokenizer_would_merge_across_the_end_of_a_prompt_stays_apart(language_models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(language_models["smollm2"])
    template = template_of("smollm2", tokenizer)
    turns = [(TURNS[0][0], "\n\nIt is red."), TURNS[1]]
    prompt = asked(template, [], turns[0][0], tokenizer)
    chat = template.copy()
    chat.messages = [[chat.roles[0], turns[0][0]], [chat.roles[1], turns[0][1]]]
    from llava.mm_utils import tokenizer_image_token

    assert tokenizer_image_token(chat.get_prompt(), tokenizer)[: len(prompt)] != prompt  # it does merge
    ids, labels = encode(sample(turns), template, tokenizer, has_image=True)
    (begin, end), _ = runs(labels)
    assert ids[:begin].tolist() == prompt
    assert tokenizer.decode(ids[begin:end]) == "\n\nIt is red.<|im_end|>"


def test_a_first_turn_of_the_model_is_left_out_and_a_last_question_is_not_learned(
    language_models: dict[str, Path],
) -> None:
    tokenizer = tokenizer_of(language_models["qwen2"])
    template = template_of("qwen2_5", tokenizer)
    turns = sample(TURNS)
    whole = encode(turns, template, tokenizer, has_image=True)
    begun = encode([{"from": "gpt", "value": "Hello."}, *turns], template, tokenizer, has_image=True)
    assert torch.equal(whole[0], begun[0]) and torch.equal(whole[1], begun[1])
    ids, labels = encode([*turns, {"from": "human", "value": "Why?"}], template, tokenizer, has_image=True)
    assert torch.equal(ids[: len(whole[0])], whole[0]) and torch.equal(labels[: len(whole[0])], whole[1])
    assert len(ids) > len(whole[0]) and bool((labels[len(whole[0]) :] == IGNORED).all())
    with pytest.raises(AssertionError, match="turn 1 is by the same speaker"):
        encode([turns[0], turns[0]], template, tokenizer, has_image=True)


def test_a_text_that_is_too_long_is_cut_as_llava_cuts_it(language_models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(language_models["qwen2"])
    template = template_of("qwen2_5", tokenizer)
    tokenizer.model_max_length = 20
    ids, labels = encode(sample([("Why?", "Because.")]), template, tokenizer, has_image=False)
    assert (len(ids), len(labels)) == (20, 20)


def test_a_prompt_keeps_what_stands_behind_an_image(language_models: dict[str, Path]) -> None:
    """SmolLM2's prompts begin with its `bos_token`, for which LLaVA would drop the line break behind the image."""
    from llava.mm_utils import tokenizer_image_token
    from transformers import AutoTokenizer

    text = "<|im_start|>user\n<image>\nWhat?"
    folder = language_models["smollm2"]
    dropped = tokenizer_image_token(text, AutoTokenizer.from_pretrained(folder))
    kept = tokenizer_image_token(text, tokenizer_of(folder))
    assert kept[kept.index(-200) + 1] == tokenizer_of(folder)("\n").input_ids[0]
    assert len(kept) == len(dropped) + 1


def test_a_turns_end_is_attended_to_where_it_is_also_the_padding(language_models: dict[str, Path]) -> None:
    from llava.train.train import DataCollatorForSupervisedDataset
    from transformers import AutoTokenizer

    def mask(tokenizer: Any) -> list[list[bool]]:
        rows = [torch.tensor([5, tokenizer.eos_token_id, 7]), torch.tensor([5, 6])]
        batch = DataCollatorForSupervisedDataset(tokenizer)([{"input_ids": row, "labels": row} for row in rows])
        found: list[list[bool]] = batch["attention_mask"].tolist()
        return found

    tokenizer = tokenizer_of(language_models["phi"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert mask(tokenizer) == [[True, True, True], [True, True, False]]
    unprepared = AutoTokenizer.from_pretrained(language_models["phi"])
    unprepared.pad_token = unprepared.unk_token
    assert mask(unprepared) == [[True, False, True], [True, True, False]]  # LLaVA's own, as it is
    assert attend_to_ends.__module__.startswith("llava_steering_plugin") and not is_prepared(unprepared)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.name)
def test_a_tokenizer_pads_after_llava_has_set_its_padding(family: Family, language_models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizers(AutoTokenizer, "some").from_pretrained(language_models[family.name], use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token  # as train() does
    assert tokenizer.pad_token_id is not None
    assert tokenizer.bos_token is None or tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert is_prepared(tokenizer) and tokenizer.is_fast


def test_llavas_page_gives_a_picture_beside_the_text(language_models: dict[str, Path]) -> None:
    template = template_of("qwen2_5", None)
    chat = template.copy()
    chat.append_message(chat.roles[0], ("Who? <image>", object(), "Default"))
    chat.append_message(chat.roles[1], None)
    assert "<|im_start|>user\n<image>\nWho?<|im_end|>" in chat.get_prompt()
    assert (chat.sep, chat.sep2) == ("<|im_end|>", "<|im_end|>")
    assert template.messages == [] and chat.copy().messages == chat.messages and chat.copy() is not chat
