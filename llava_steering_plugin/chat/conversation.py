"""A conversation with a model and its adapters: prompts as upstream's chat writes them, the adapter by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token
from PIL import Image

from llava_steering_plugin.chat.streaming import AnswerStop, AnswerStreamer, Speed, first_interrupt
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.base_model import LoadedBase
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import image_arguments, read_image
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.upstream.names import CHAT_PREFIXES
from llava_steering_plugin.upstream.text.conversations import about_an_image, checked_template, template_by_name


class ChatError(SteeringError):
    """Raised when a question or command cannot be carried out; the conversation goes on."""


@dataclass(frozen=True)
class Answer:
    """The answer to a question; `stopped` if the user interrupted it."""

    text: str
    speed: Speed
    stopped: bool


def template_of_adapter(conversation: str | None, adapter: str | None = None) -> str:
    """Return the template that upstream's chat uses for an adapter trained with `conversation`.

    Where upstream's rules lead to none, return the one that the adapter was trained with.
    """
    prefix = CHAT_PREFIXES.get(conversation or "v0")
    return template_by_name(prefix) if prefix is not None else checked_template(str(conversation), adapter)


class Chat:
    """Keeps one conversation about at most one image; answers are greedy or sampled.

    Args:
        loaded: the model that answers, with its adapters.
        templates: the conversation template of each name in the pool.
        adapter: the adapter that answers first.
        temperature: 0 decodes greedily.
    """

    def __init__(
        self,
        loaded: LoadedBase,
        templates: Mapping[str, str],
        *,
        adapter: str = BASE,
        temperature: float = 0.2,
        max_new_tokens: int = 512,
    ):
        self.pool = loaded.pool
        self.model: Any = loaded.pool.model
        self.tokenizer = loaded.tokenizer
        self.processor = loaded.processor
        self.templates = templates
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.adapter = adapter
        self.image_file: Path | None = None
        self._image: Image.Image | None = None
        self.reset()

    @property
    def turns(self) -> int:
        """The number of questions that have been answered."""
        return int(len(self._conversation.messages) - self._conversation.offset) // 2

    def reset(self) -> None:
        """Forget the conversation; adapter and image stay."""
        self._conversation = conv_templates[self.templates[self.adapter]].copy()

    def use(self, adapter: str) -> bool:
        """Let `adapter` answer from now on; return whether its template differs, which begins a new conversation.

        Raises:
            ArgumentsError: there is no such adapter; the message lists those there are.
        """
        self.pool.check(adapter)
        changed = self.templates[adapter] != self.templates[self.adapter]
        self.adapter = adapter
        if changed:
            self.reset()
        return changed

    def look_at(self, file: str) -> None:
        """Begin a new conversation about the image in `file`.

        Raises:
            ChatError: there is no such file, or it holds no image; the conversation stays as it is.
        """
        if self.processor is None:
            raise ChatError("this model takes no images: it is a plain language model, not a LLaVA.")
        path = Path(os.path.expanduser(file))
        try:
            self._image = read_image(path)
        except ArgumentsError as error:
            hint = "" if os.path.exists(path) else " The file name extends to the end of the line."
            raise ChatError(f"{error}{hint}") from error
        self.image_file = path
        self.reset()

    def drop_image(self) -> None:
        """Begin a new conversation without an image."""
        self.image_file = self._image = None
        self.reset()

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """Ask the current adapter, and pass its answer to `show` piece by piece. Ctrl-C ends the answer only.

        Raises:
            ChatError: the question is empty or too long, or memory has run out; the conversation stays as it was.
        """
        if not question.strip():
            raise ChatError("the question is empty.")
        if DEFAULT_IMAGE_TOKEN in question:
            raise ChatError(
                f"a question cannot contain {DEFAULT_IMAGE_TOKEN}, which stands for an image; use /image FILE."
            )
        attempt = self._conversation.copy()
        attempt.append_message(attempt.roles[0], self._with_image(question) if self.turns == 0 else question)
        attempt.append_message(attempt.roles[1], None)
        by_first = attempt.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
        streamer = AnswerStreamer(self.tokenizer, (attempt.sep if by_first else attempt.sep2) or "", show)
        stop = AnswerStop(streamer)
        try:
            with first_interrupt(stop.interrupt), streamer.watching(self.pool.stack):
                self._generate(attempt.get_prompt(), streamer, stop)
        except KeyboardInterrupt:  # the second Ctrl-C, in the middle of a pass
            stop.interrupt()
            streamer.end()
        except torch.cuda.OutOfMemoryError as error:
            raise ChatError(f"the device is out of memory: {error}. /reset begins a new conversation.") from error
        if streamer.text or not stop.interrupted:  # an answer stopped before its first word leaves no turn
            attempt.messages[-1][-1] = streamer.text.strip()
            self._conversation = attempt
        return Answer(streamer.text.strip(), streamer.speed(), stop.interrupted)

    def _with_image(self, question: str) -> str:
        return question if self._image is None else about_an_image(question, self.pool.config_of(self.adapter))

    def _generate(self, prompt: str, streamer: AnswerStreamer, stop: AnswerStop) -> None:
        ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        room = self._room(ids)
        options: dict[str, Any] = {"temperature": self.temperature} if self.temperature > 0 else {}
        if self._image is not None:
            options |= image_arguments([self._image], self.processor, self.model, self.pool.config_of(self.adapter))
        with torch.inference_mode():
            self.model.generate(
                ids.to(self.model.device),
                do_sample=self.temperature > 0,
                max_new_tokens=min(self.max_new_tokens, room),
                streamer=streamer,
                stopping_criteria=[stop],
                use_cache=True,
                adapter_names=self.adapter,
                **options,
            )

    def _room(self, ids: torch.Tensor) -> int:
        """Return how many tokens the context holds after the prompt.

        Raises:
            ChatError: none, or LLaVA would cut the end of the prompt off.
        """
        tokens = PromptTokens.of_model(self.model)
        length = tokens.count(ids[0].tolist(), [] if self._image is None else [self._image.size])
        most = tokens.context.prompt(self._image is not None)
        if most is not None and length > most:
            raise ChatError(
                f"the conversation is too long: {length:,} tokens with this question; the model takes {most:,}. "
                "/reset begins a new one."
            )
        positions = tokens.context.positions
        return self.max_new_tokens if positions is None else positions - length
