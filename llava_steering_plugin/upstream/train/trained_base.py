"""Find out, before anything is loaded, with which language model and template a training works."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.training.settings.flags import LANGUAGE_MODEL, mode_is_on
from llava_steering_plugin.upstream.model.component_checks import absent_components
from llava_steering_plugin.upstream.model.language_models import chosen, unknown_type
from llava_steering_plugin.upstream.startup import flag_value
from llava_steering_plugin.upstream.text.chat_templates import OF_TOKENIZER, offer


@dataclass(frozen=True)
class TrainedBase:
    """The base of a training.

    Attributes:
        component: makes its LLaVA; None if LLaVA's own classes do.
        problems: what is wrong with it, as far as its config.json and its tokenizer tell.
        described: its config.json; None if it cannot be read, or a component makes its LLaVA.
    """

    component: type[LanguageModel] | None = None
    problems: list[str] = field(default_factory=list)
    described: dict[str, Any] | None = None

    @classmethod
    def of(cls, flags: Namespace, words: Sequence[str]) -> TrainedBase:
        """Read the config.json of --model_name_or_path and, for `--version tokenizer`, its tokenizer.

        Args:
            flags: of the training.
            words: its command line.
        """
        base, named = flags.model_name_or_path, getattr(flags, LANGUAGE_MODEL, None)
        problems: list[str] = []
        component = None
        try:
            described = read_config(base)
        except SteeringError as error:
            if named:
                return cls(None, [f"--{LANGUAGE_MODEL} {named}: {error}"])
            # Without a mode LLaVA says itself what it cannot read, after it has asked the hub for a minute.
            return cls(None, [f"--model_name_or_path: {error}"] if mode_is_on(flags) else [])
        try:
            component = chosen(described, base, named)
        except SteeringError as error:
            problems.append(str(error))
        else:
            # Of a component that is absent, the check of components says which package brings it.
            if component is None and mode_is_on(flags) and not absent_components(described):
                problems += filter(None, [unknown_type(str(described["model_type"]), base)])
        if component is not None:
            problems += _of_component(component, flags, words)
        if flags.version == OF_TOKENIZER and not problems:  # of a model that cannot be trained, it cannot be read
            problems += _of_template(base)
        return cls(component, problems, described if component is None else None)


def _of_component(component: type[LanguageModel], flags: Namespace, words: Sequence[str]) -> list[str]:
    """Return what LLaVA's train() would do otherwise than asked for."""
    problems = []
    if flags.vision_tower is None:
        problems.append(f"--vision_tower is missing: without one, LLaVA would build a Llama, not {component.name}")
    if "mpt" in flags.model_name_or_path:
        problems.append(
            f"--model_name_or_path {flags.model_name_or_path} has 'mpt' in its name, by which LLaVA would build "
            "an MPT: rename the folder"
        )
    if flag_value(words, "--version") is None:
        problems.append(
            f"--version is missing, and LLaVA's default is Vicuna's. --version {component.version} suits "
            f"{component.name}; stage 1 takes --version plain"
        )
    return problems


def _of_template(base: str) -> list[str]:
    """Offer the template of the base's tokenizer, or return why there is none."""
    from transformers import AutoTokenizer

    named = ", ".join(name for name in sys.modules["llava.conversation"].conv_templates if name != OF_TOKENIZER)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        return [f"--version {OF_TOKENIZER}: the tokenizer of {base} cannot be loaded: {error}"]
    try:
        offer(tokenizer, base)
    except SteeringError as error:
        return [f"--version {OF_TOKENIZER}: {error}. Give one that LLaVA has: {named}"]
    return []
