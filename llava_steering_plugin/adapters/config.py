"""adapter_config.json: what an adapter is, what it was trained on, and how its prompts are written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from llava_steering_plugin import __version__
from llava_steering_plugin.errors import AdapterError, listing

FORMAT_VERSION = 1
PEFT_PREFIX = "LLAVA_"


@dataclass(frozen=True)
class BaseModel:
    """The backbone that an adapter belongs to.

    Attributes:
        name_or_path: where it is loaded from: a folder or a hub id.
        model_type: its config.json's `model_type`.
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
    """Everything about an adapter but its tensors.

    Attributes:
        mode, settings: the tuning mode and its settings.
        base: the backbone.
        conversation: name of LLaVA's conversation template that it was trained with; None if unknown.
        added_tokens: tokens that training added to the base's tokenizer, with their ids, in order.
        trained_on: what a reader of the card may want to know of the training: bits, dtype.
    """

    mode: str
    settings: dict[str, Any]
    base: BaseModel
    conversation: str | None = None
    added_tokens: dict[str, int] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """PEFT's keys where PEFT has them, so that tools which list adapters show the right base."""
        return json.dumps(
            {
                "peft_type": PEFT_PREFIX + self.mode.upper(),
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": self.base.name_or_path,
                "format_version": FORMAT_VERSION,
                "plugin_version": __version__,
                "mode": self.mode,
                "settings": self.settings,
                "base": {key: value for key, value in dataclasses.asdict(self.base).items() if key != "name_or_path"},
                "conversation": self.conversation,
                "added_tokens": self.added_tokens,
                "trained_on": self.trained_on,
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> AdapterConfig:
        """Parses and checks; `where` names the file in errors.

        Raises:
            AdapterError: not JSON, not ours, of a newer format, or with missing or mistyped entries (all listed).
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise AdapterError(f"{where} is no JSON: {error}. The file is damaged; copy the adapter again.") from error
        peft_type = data.get("peft_type") if isinstance(data, dict) else None
        if not is_ours(peft_type):
            raise AdapterError(
                f"{where} is not an adapter of this plugin: peft_type is {peft_type!r}. "
                "Load it with the library that made it" + (" (peft, or upstream's --model-base)." if peft_type else ".")
            )
        newest = data.get("format_version")
        if newest != FORMAT_VERSION:
            raise AdapterError(
                f"{where} has adapter format {newest!r} and this version of llava-steering-plugin reads format "
                f"{FORMAT_VERSION}. Upgrade the package: pip install -U llava-steering-plugin."
            )
        kinds: dict[str, type | tuple[type, ...]] = {
            "mode": str,
            "settings": dict,
            "base": dict,
            "base_model_name_or_path": str,
            "conversation": (str, type(None)),
            "added_tokens": dict,
            "trained_on": dict,
        }
        problems = [f"{key} is {data.get(key)!r}" for key, kind in kinds.items() if not isinstance(data.get(key), kind)]
        if not problems:
            base_kinds = {"model_type": str, "hidden_size": int, "num_layers": int, "vocab_size": int}
            problems = [
                f"base.{key} is {data['base'].get(key)!r}"
                for key, kind in base_kinds.items()
                if not isinstance(data["base"].get(key), kind)
            ]
            problems += [
                f"added_tokens.{token} is {number!r}"
                for token, number in data["added_tokens"].items()
                if type(number) is not int or number < 0
            ]
        if problems:
            raise AdapterError(
                listing(f"{where} is damaged or was edited by hand; these entries are missing or wrong", problems)
            )
        base = BaseModel(data["base_model_name_or_path"], **{key: data["base"][key] for key in base_kinds})
        return cls(data["mode"], data["settings"], base, data["conversation"], data["added_tokens"], data["trained_on"])


def is_ours(peft_type: object) -> bool:
    """Whether a `peft_type` names one of this plugin's formats."""
    return isinstance(peft_type, str) and peft_type.startswith(PEFT_PREFIX)
