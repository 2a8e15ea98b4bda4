"""The fields of a request, checked by pydantic. What would change the answer and is not done here is refused by name.

A field that says what is done anyway (`"tools": []`), or that no answer depends on (`"user"`), is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llava_steering_plugin.errors import shortened
from llava_steering_plugin.serving.http.openai.errors import ApiError

CHOICES, STOPS, STOP_CHARACTERS = 8, 4, 256
TOKENS = 1_000_000
SHOWN_CHARACTERS = 60  # of a word of the request, in an error

# Fields that are known and not followed, with the values that change nothing. Some are vLLM's.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    # Of the messages that clients send back as they came.
    "refusal": ("",),
    "annotations": ([],),
    "tool_calls": ([],),
    # Of stream_options.
    "include_obfuscation": (True, False),
    "continuous_usage_stats": (False,),
}
# No answer depends on them: who asks, what is kept, how fast it comes.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "prediction",
}

# What pydantic finds wrong, in our words; for the rest its own will do.
SAID = {
    "missing": "is missing",
    "model_type": "has to be an object",
    "model_attributes_type": "has to be an object",
    "list_type": "has to be a list",
    "string_type": "has to be a text",
    "string_unicode": "holds half a character",
    "int_type": "has to be a whole number",
    "int_from_float": "has to be a whole number",
    "float_type": "has to be a number",
    "finite_number": "has to be a finite number",
    "bool_type": "has to be true or false",
    "greater_than_equal": "has to be {ge} at least",
    "less_than_equal": "has to be {le} at most",
    "too_short": "has to have {min_length} entry at least",
    "too_long": "has to have {max_length} entries at most",
    "string_too_short": "has to have {min_length} character at least",
    "string_too_long": "has to have {max_length} characters at most",
    "union_tag_invalid": "is of the type {tag!r:.60}; there are {expected_tags}",
    "union_tag_not_found": "has no type; there are 'text', 'image_url'",
}
TEXT_OR_LIST = ("content", "stop")

Model = TypeVar("Model", bound=BaseModel)


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "half a character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS), AfterValidator(_whole)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if not (value is None or cls._changes_nothing(name, value))}

    @classmethod
    def _changes_nothing(cls, name: str, value: Any) -> bool:
        if name in cls.model_fields:
            return False
        # type(): False equals 0.
        kept = (each for each in NEUTRAL.get(name, ()) if isinstance(each, bool) == isinstance(value, bool))
        return name in IGNORED or any(each == value for each in kept)


class TextPart(_Fields):
    """Holds text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Fields):
    """Names the place of an image. `detail` has no effect: an image is cut as the adapter was trained."""

    url: Text
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Fields):
    """Holds an image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Fields):
    """Holds what one speaker says: texts and images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(min_length=1)

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def images(self) -> list[tuple[str, str]]:
        """The place of each image in the message, such as `content[1].image_url`, and its URL, in their order."""
        return [
            (f"content[{number}].image_url", part.image_url.url)
            for number, part in enumerate(self.content)
            if isinstance(part, ImagePart)
        ]

    @property
    def text(self) -> str:
        """The texts, each on a line of its own."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))


class StreamOptions(_Fields):
    """Says what a stream brings beside the answer."""

    include_usage: bool = False


class ChatRequest(_Fields):
    """A request for the next message of a conversation."""

    model: Text
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS), AfterValidator(_whole)]] = Field(
        [], max_length=STOPS
    )
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    n: int = Field(1, ge=1, le=CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError('stream_options needs "stream": true')
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def tokens(self) -> int | None:
        """The most tokens of an answer; None: as many as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class LoadRequest(_Fields):
    """A request to add an adapter, in vLLM's spelling; `load_inplace` replaces the one of that name."""

    lora_name: Text
    lora_path: Annotated[str, Field(min_length=1), AfterValidator(_whole)]
    load_inplace: bool = False


class UnloadRequest(_Fields):
    """A request to remove an adapter, in vLLM's spelling."""

    lora_name: Text


def checked(kind: type[Model], data: Any) -> Model:
    """Return a request of that kind.

    Raises:
        ApiError: fields are missing, wrong, or change the answer in a way that is not done here (400, all listed).
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True)
        problems = list(dict.fromkeys(_problem(each) for each in found))
        fields = {_field(each["loc"]) for each in found}
        unsupported = all(each["type"] == "extra_forbidden" for each in found)
        raise ApiError(
            400,
            f"The request cannot be answered: {'; '.join(shortened(problems))}.",
            param=(fields.pop() or None) if len(fields) == 1 else None,
            code="unsupported_parameter" if unsupported else "invalid_value",
        ) from None  # the error holds the request


def _problem(error: Mapping[str, Any]) -> str:
    field, given, kind = _field(error["loc"]), error["input"], error["type"]
    if kind == "extra_forbidden":
        known = " with this value" if error["loc"][-1] in NEUTRAL else ""
        return f"{field} is not supported{known}"
    if kind == "list_type" and error["loc"][-1] in TEXT_OR_LIST:
        return f"{field} has to be a text or a list"
    if kind == "literal_error":
        shown = f" {given[:SHOWN_CHARACTERS]!r}" if isinstance(given, str) else ""
        return f"{field}{shown} is not supported; there are {error['ctx']['expected']}"
    if kind in SAID:
        numbers = {name: _plain(value) for name, value in error.get("ctx", {}).items()}
        return f"{field} {SAID[kind].format(**numbers)}"
    text = str(error["msg"]).removeprefix("Value error, ")
    said = f"{field}: {text[0].lower()}{text[1:]}" if field else text
    return said


def _plain(value: Any) -> Any:
    """Return a number as one writes it: 1,000,000, and 2 for 2.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else value


def _field(where: tuple[int | str, ...]) -> str:
    """Return a place in a request as it is written in Python: `messages[0].content[1].text`."""
    words = ""
    for number, step in enumerate(where):
        if number == 4 and where[0] == "messages" and where[2] == "content":
            continue  # the kind of the part, which pydantic names beside its fields
        shown = str(step)[:SHOWN_CHARACTERS]
        words += f"[{shown}]" if isinstance(step, int) else f".{shown}" if words else shown
    return words
