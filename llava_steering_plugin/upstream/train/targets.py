"""Turn samples into ids and targets, for any tokenizer: a training sees the ids of a chat, and learns its answers.

LLaVA's own `preprocess` finds answers by the lengths of pieces, counts on a token before every text, and on tokenizers
that never merge the end of one piece with the beginning of the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.training.attaching import REQUEST
from llava_steering_plugin.training.settings.flags import mode_is_on
from llava_steering_plugin.upstream.seams import require
from llava_steering_plugin.upstream.text.chat_templates import is_chat_template
from llava_steering_plugin.upstream.text.tokenizers import is_prepared

Turn = Mapping[str, str]


def of_any_tokenizer(
    original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Wrap LLaVA's `preprocess`: prepared tokenizers and chat formats take another way than Llama's with a template."""
    given = dict(zip(("sources", "tokenizer", "has_image"), args, strict=False)) | kwargs
    conversations = import_module("llava.conversation")
    template = require(conversations, "default_conversation")
    plain = template.sep_style == require(conversations, "SeparatorStyle.PLAIN")  # captions: one length is all it asks
    if plain or not (is_chat_template(template) or is_prepared(given["tokenizer"])):
        request = REQUEST.get()
        sources = copy.deepcopy(given["sources"]) if request is not None and mode_is_on(request.flags) else None
        made = original(*args, **kwargs)
        if sources is not None:
            clear_first_prompts(made, sources, lambda turns: original(**{**given, "sources": [turns]}))
        return made
    encoded = [
        encode(source, template, given["tokenizer"], has_image=given.get("has_image", False))
        for source in given["sources"]
    ]
    return {"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]}


def prompt_ids(said: Sequence[str], template: Any, tokenizer: Any) -> list[int]:
    """Return the ids of a conversation whose next answer is to come: those with which a training begins.

    Args:
        said: what is said in turn, the user's first and last; <image> stands for an image.
        template: one of LLaVA's conversation templates, without messages.
    """
    if is_chat_template(template) or is_prepared(tokenizer):
        answered = [*said, "some answer"]  # begins behind what is looked for
        turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(answered)]
        ids, targets = encode(turns, template, tokenizer, has_image=True)
        known: list[int] = ids[: int((targets == IGNORED).nonzero()[-1]) + 1].tolist()
        return known
    conversation = template.copy()
    for number, text in enumerate([*said, None]):
        conversation.append_message(conversation.roles[number % 2], text)
    return _ids(conversation.get_prompt(), tokenizer, True)


def clear_first_prompts(made: Any, sources: Sequence[Sequence[Turn]], prepare: Callable[[list[Turn]], Any]) -> None:
    """Learn nothing before the first answer, so that it shows where the prompt ends.

    LLaVA-NeXT's templates for Qwen and Llama 3 also have the marks of speakers learned, from the first token of a text
    on. The prompt that a mode looks at would then have no tokens, and at inference all of them.

    Args:
        made: what LLaVA's `preprocess` returned; its labels are changed.
        sources: what it was given.
        prepare: prepares one conversation.
    """
    for turns, ids, labels in zip(sources, made["input_ids"], made["labels"], strict=True):
        first = next((number for number, turn in enumerate(turns) if number and turn["from"] == "gpt"), None)
        if first is None or not len(labels) or int(labels[0]) == IGNORED:
            continue
        unanswered: list[Turn] = [*map(dict, turns[:first]), {**turns[first], "value": ""}]
        without = prepare(unanswered)["input_ids"][0][: len(ids)]
        alike = torch.as_tensor(ids)[: len(without)] == torch.as_tensor(without)
        labels[: int(alike.long().cumprod(0).sum())] = IGNORED


def encode(turns: Sequence[Turn], template: Any, tokenizer: Any, *, has_image: bool) -> tuple[Tensor, Tensor]:
    """Return ids and targets of one conversation, both [positions], int64.

    The ids before an answer are those of the prompt that a chat would write there, and the targets are all that follows
    until the answer's end is said. Where a tokenizer would merge the last of a prompt with the first of its answer, the
    two stay apart, as they are when the model answers.

    Args:
        turns: as LLaVA's data files hold them; a first turn that is not the user's is left out.
        template: one of LLaVA's conversation templates.
        has_image: <image> in a text stands for one.

    Raises:
        KeyError: a turn is by neither "human" nor "gpt".
        AssertionError: two turns in a row are by the same one, as LLaVA raises it.
    """
    ids: list[int] = []
    targets: list[int] = []
    before = ""
    for text, learned in _pieces(turns, template):
        now = _ids(text, tokenizer, has_image)
        if now[: len(ids)] != ids:
            now = ids + _ids(text[len(before) :], tokenizer, has_image, begun=True)
        targets += now[len(ids) :] if learned else [IGNORED] * (len(now) - len(ids))
        ids, before = now, text
    # Those with an image are cut by the collator, as LLaVA's are.
    limit = None if has_image else tokenizer.model_max_length
    return torch.tensor(ids[:limit], dtype=torch.long), torch.tensor(targets[:limit], dtype=torch.long)


def _pieces(turns: Sequence[Turn], template: Any) -> Iterator[tuple[str, bool]]:
    """Yield the conversation up to each end of a prompt (False), and up to each end of an answer (True)."""
    conversation = template.copy()
    conversation.messages = []
    roles = dict(zip(("human", "gpt"), conversation.roles, strict=True))
    turns = turns if not turns or roles[turns[0]["from"]] == conversation.roles[0] else turns[1:]
    for number, turn in enumerate(turns):
        role = roles[turn["from"]]
        assert role == conversation.roles[number % 2], f"turn {number} is by the same speaker as the one before"
        if number % 2:
            conversation.append_message(role, None)
            yield conversation.get_prompt(), False
            conversation.messages[-1][1] = turn["value"]
            yield conversation.get_prompt(), True
        else:
            conversation.append_message(role, turn["value"])
    if len(turns) % 2:
        yield conversation.get_prompt(), False


def _ids(text: str, tokenizer: Any, has_image: bool, *, begun: bool = False) -> list[int]:
    """Return the ids of a text as a chat has them; of one that goes on (`begun`), without what begins a text."""
    if has_image:
        tokenize = require(import_module("llava.mm_utils"), "tokenizer_image_token")
        found: list[int] = tokenize(text, tokenizer)
    else:
        found = list(tokenizer(text).input_ids)
    begins = tokenizer.bos_token_id
    return found[1:] if begun and begins is not None and found[:1] == [begins] else found
