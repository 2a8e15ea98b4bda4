"""The text of a conversation as a language model was trained with it, read from its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_steering_plugin.errors import ArgumentsError

# Stand for what is said, in a template that is looked at. No template holds them, or strips anything of them.
_SAID = tuple(f"{speaker}{number}said" for number in "123" for speaker in ("question", "answer"))


@dataclass(frozen=True)
class ChatFormat:
    """The texts around what is said: `opening ask QUESTION answer lead ANSWER end`, `between ask QUESTION` and so on.

    Attributes:
        opening: before the first turn, such as a system prompt. Without what the tokenizer puts there itself.
        ask: before a question.
        answer: between a question and its answer; a prompt ends with it.
        end: behind an answer. A model learns to say it, and answering stops there.
        between: from there to the next `ask`.
        lead: before an answer, and said by the model, such as a space: a prompt that ended with one would have other
            tokens than the conversation that it begins.
    """

    opening: str
    ask: str
    answer: str
    end: str
    between: str = ""
    lead: str = ""

    def write(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return a conversation as text; an answer of None is still to come."""
        texts = [
            f"{self.ask}{question}{self.answer}" + ("" if answer is None else f"{self.lead}{answer}{self.end}")
            for question, answer in turns
        ]
        return self.opening + self.between.join(texts)


def chatml(system: str) -> ChatFormat:
    """Return ChatML with a system prompt, as Qwen's and SmolLM2's templates write it."""
    return ChatFormat(
        f"<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
    )


def format_of(tokenizer: Any, whose: str) -> ChatFormat:
    """Return the chat format that a tokenizer's own chat template describes.

    Args:
        tokenizer: of transformers.
        whose: the model, for errors.

    Raises:
        ArgumentsError: it has no chat template, or one that is no sequence of turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentsError(
            f"the tokenizer of {whose} has no chat template, so there is no conversation to read from it"
        )

    def render(messages: list[dict[str, str]], to_be_answered: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_be_answered))

    try:
        read = read_format(render, stops=_stops(tokenizer))
    except ImportError as error:
        raise ArgumentsError(f"{error} LLaVA brings jinja2 with its demo: pip install jinja2.") from error
    except Exception as error:  # a template is a program: it raises what it likes
        raise ArgumentsError(f"the chat template of {whose} cannot be read: {type(error).__name__}: {error}") from error
    if read is None:
        raise ArgumentsError(
            f"the chat template of {whose} writes turns that differ from place to place, or answers that are no "
            "continuation of their prompts. A training needs one text for both"
        )
    # Where the tokenizer begins every text so by itself, the template must not.
    begins = tokenizer.bos_token
    if not begins or not begins_texts(tokenizer):
        return read
    if read.opening:
        return replace(read, opening=read.opening.removeprefix(begins))
    if read.ask.startswith(begins):  # before every question, as Llama 2's
        return replace(read, ask=read.ask.removeprefix(begins), between=read.between + begins)
    return read


def _stops(tokenizer: Any) -> list[str]:
    """Return the special tokens of a tokenizer; Phi-3's `<|end|>` is one that no attribute names."""
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [each for each in (tokenizer.eos_token, *tokenizer.additional_special_tokens, *added) if each]


def begins_texts(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its token for a beginning before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def read_format(render: Callable[[list[dict[str, str]], bool], str], stops: Sequence[str] = ()) -> ChatFormat | None:
    """Find the texts of a format in conversations that a template has written; None if they are not to be found.

    Args:
        render: writes messages ({"role": "user" or "assistant", "content": ...}), and, if the second argument is true,
            what comes before the next answer.
        stops: tokens that may end an answer.
    """
    messages = [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 3, _SAID, strict=True)]
    written = [render(messages[:count], False) for count in (2, 4, 6)]
    prompts = [render(messages[:count], True) for count in (1, 3, 5)]
    try:
        before, answer, behind = _around(written[0], _SAID[:2])
        _, _, turn, _, last = _around(written[1], _SAID[:4])
        _, asked = _around(prompts[0], _SAID[:1])
    except ValueError:
        return None
    # Behind the last answer, a template may close the text, as Phi-3's does with a token that no turn ends with.
    closing = next((stop for stop in stops if not turn.startswith(behind) and behind.endswith(stop)), "")
    if last != behind or not answer.startswith(asked):
        return None
    behind = behind.removesuffix(closing)
    if not turn.startswith(behind) or (closing and not behind):
        return None
    ask = turn.removeprefix(behind)
    if not before.endswith(ask) and not ask.endswith(before):
        return None
    # "<|im_end|>\n": the model says the token; the line break only comes before a next turn.
    found = [behind.index(stop) + len(stop) for stop in stops if stop in behind]
    cut = min(found) if found else len(behind)
    end, between = behind[:cut], behind[cut:]
    if before.endswith(ask):
        opening = before.removesuffix(ask)
    else:  # "\nUSER: " between turns, "USER: " at the beginning
        opening, between, ask = "", between + ask.removesuffix(before), before
    read = ChatFormat(opening, ask, asked, end, between, answer.removeprefix(asked))
    turns = list(zip(_SAID[::2], _SAID[1::2], strict=True))
    tail = behind[cut:] + closing
    if any(read.write(turns[: number + 1]) + tail != written[number] for number in range(3)):
        return None
    open_turns = [[*turns[:number], (turns[number][0], None)] for number in range(3)]
    return read if [read.write(each) for each in open_turns] == prompts else None


def _around(text: str, said: Sequence[str]) -> list[str]:
    """Return what stands before, between and behind the given pieces of a text.

    Raises:
        ValueError: one is missing.
    """
    parts = []
    for piece in said:
        at = text.index(piece)
        parts.append(text[:at])
        text = text[at + len(piece) :]
    return [*parts, text]
