"""The config of an adapter: its mode, its settings, its base, and how its prompts are written. Format 1, as JSON.

Reading checks it whole (`schema.py`), so that everything behind it can rely on types and ranges.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from llava_steering_plugin import __version__
from llava_steering_plugin.adapters.stored.schema import BASE, config_problems, llava_problems
from llava_steering_plugin.errors import AdapterError, listing, shortened
from llava_steering_plugin.foreign_files import CONFIG_BYTES, brief, parse_json

# Format 2 is format 1 with the mode's tensors under the names of PEFT's, and is written for its methods alone.
FORMAT_VERSION, PEFT_FORMAT = 1, 2
OWN_TYPES = "LLAVA_"  # what `peft_type` begins with in our configs


@dataclass(frozen=True)
class BaseModel:
    """The base that an adapter belongs to.

    Attributes:
        name_or_path: where it is loaded from: a folder or a hub id.
        model_type: `model_type` of its config.json.
        hidden_size, num_layers: of the decoder.
        vocab_size: rows of its embedding before training added any token.
    """

    name_or_path: str
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int

    def __str__(self) -> str:
        return f"{self.name_or_path} ({self.num_layers} layers of width {self.hidden_size})"


@dataclass(frozen=True)
class AdapterConfig:
    """Everything about an adapter but its tensors and its LLaVA config.

    Attributes:
        mode, settings: the tuning mode and its settings.
        base: the model that it was trained on.
        conversation: name of LLaVA's conversation template that it was trained with; None if unknown.
        added_tokens: tokens that training added to the base's tokenizer, with their ids, in order.
        trained_on: bits, compute dtype and quantisation of the training; for the model card only.
        peft_prefix: what PEFT puts before the names of the mode's tensors; None: they have names of ours.
        chat_template: writes the same prompts as `conversation`, for processors of transformers; None if unknown.
    """

    mode: str
    settings: dict[str, Any]
    base: BaseModel
    conversation: str | None = None
    added_tokens: dict[str, int] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    peft_prefix: str | None = None
    chat_template: str | None = None

    def to_json(self) -> str:
        """Return the text that the header and llava_steering_config.json hold."""
        return json.dumps(
            {
                "peft_type": OWN_TYPES + self.mode.upper(),
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": self.base.name_or_path,
                "format_version": FORMAT_VERSION if self.peft_prefix is None else PEFT_FORMAT,
                "plugin_version": __version__,
                "mode": self.mode,
                "settings": self.settings,
                "base": {key: value for key, value in dataclasses.asdict(self.base).items() if key != "name_or_path"},
                "conversation": self.conversation,
                "added_tokens": self.added_tokens,
                "trained_on": self.trained_on,
                **({} if self.peft_prefix is None else {"peft_prefix": self.peft_prefix}),
                **({} if self.chat_template is None else {"chat_template": self.chat_template}),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> AdapterConfig:
        """Parse and check a config; keys that this version does not know are ignored.

        Args:
            text: as `to_json` writes it.
            where: names the file in errors.

        Raises:
            AdapterError: not JSON, not ours, of another format, or with missing or mistyped entries (all listed).
        """
        try:
            if len(text) > CONFIG_BYTES:
                raise ValueError(f"it has {len(text):,} characters, and may have {CONFIG_BYTES:,}")
            data = parse_json(text)
        except ValueError as error:
            raise AdapterError(f"{where} is not JSON: {error}. The file is damaged; copy the adapter again.") from error
        peft_type = data.get("peft_type") if isinstance(data, dict) else None
        if not is_ours(peft_type):
            raise AdapterError(
                f"{where} is not an adapter of this plugin: peft_type is {brief(peft_type)}. "
                "Load it with the library that made it" + (" (peft, or upstream's --model-base)." if peft_type else ".")
            )
        _check_format(data, where)
        if problems := config_problems(data, named_by_peft=data["format_version"] == PEFT_FORMAT):
            raise AdapterError(
                listing(
                    f"{where} is damaged or was edited by hand; these entries are missing or wrong",
                    shortened(problems),
                )
            )
        base = BaseModel(data["base_model_name_or_path"], **{key: data["base"][key] for key in BASE})
        prefix = data["peft_prefix"] if data["format_version"] == PEFT_FORMAT else None
        known = {key: data[key] for key in ("mode", "settings", "conversation", "added_tokens", "trained_on")}
        return cls(base=base, peft_prefix=prefix, chat_template=data.get("chat_template"), **known)


def is_ours(peft_type: object) -> bool:
    """Tell whether a `peft_type` names an adapter of this plugin, of whatever format."""
    return isinstance(peft_type, str) and peft_type.startswith(OWN_TYPES)


def _check_format(data: dict[str, Any], where: str) -> None:
    """Refuse a format that this version does not read, and name the version to install."""
    number, writer = data.get("format_version"), data.get("plugin_version")
    if type(number) is int and number in (FORMAT_VERSION, PEFT_FORMAT):
        return
    if type(number) is not int or number < FORMAT_VERSION:
        raise AdapterError(
            f"{where} has adapter format {brief(number)}, and there is none of that number. The file is damaged or was "
            "edited by hand; copy the adapter again."
        )
    known = isinstance(writer, str) and re.fullmatch(r"\d[\w.]{0,40}", writer) and writer != __version__
    wanted = f"llava-steering-plugin>={writer}" if known else "llava-steering-plugin"
    newer = f"version {writer}, which wrote it, or a newer one" if known else "a newer one"
    raise AdapterError(
        f"{where} has adapter format {brief(number)}; this is llava-steering-plugin {__version__}, which reads formats "
        f"{FORMAT_VERSION} and {PEFT_FORMAT}. Install {newer}: "
        f"pip install -U '{wanted}'."
    )


def parse_llava_config(text: str, where: str) -> dict[str, Any]:
    """Parse and check the LLaVA config that an adapter was trained with.

    Args:
        text: as config.json holds it.
        where: names it in errors.

    Raises:
        AdapterError: not JSON, no settings, or settings of images and tokenizer that LLaVA cannot take (all listed).
    """
    try:
        if len(text) > CONFIG_BYTES:
            raise ValueError(f"it has {len(text):,} characters, and may have {CONFIG_BYTES:,}")
        described = parse_json(text)
        if not isinstance(described, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise AdapterError(f"{where} is damaged ({error}). Copy the adapter again.") from error
    if problems := llava_problems(described):
        raise AdapterError(
            listing(f"{where} is damaged or was edited by hand; these settings are wrong", shortened(problems))
        )
    return described
