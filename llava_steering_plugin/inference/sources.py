"""Names of adapters: how a command line gives them, and how the web page shows them, which picks templates by name.

Upstream's page decides by substrings, like its chat, but with rules of its own: a name without 'llava' means
`vicuna_v1`, which is what LLaVA-1.5's `--version v1` trains with, and one with 'llava' never does. So the prefixes here
differ from those of `upstream.names`, which are for the chat. Upstream main and its wheel have the same rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.adapters.stored.locate import AdapterSource, locate
from llava_steering_plugin.errors import AdapterError, ArgumentsError, Problems, SteeringError, listing
from llava_steering_plugin.upstream.names import harmless

Source = TypeVar("Source")

# The beginning of a name that makes the rules of gradio_web_server.py pick each conversation template.
PAGE_PREFIXES = {
    "v1": "",
    "vicuna_v1": "",
    "llava_v1": "llava-v1-",
    "llava_v0": "llava-",
    "llama_2": "llama-2-",
    "llava_llama_2": "llava-llama-2-",
    "mistral_instruct": "llava-mistral-",
    "chatml_direct": "llava-v1.6-34b-",
    "mistral_direct": "llava-v1.6-34b-",
    "mpt": "llava-mpt-",
    "v1_mmtag": "llava-v1-mmtag-",
    "v0_mmtag": "llava-mmtag-",
}
# The page's rules the other way round: the first whose expressions are all found in a name decides.
_OTHER_TAGS = r"(?i)mmtag|^(?!.*finetune).*plain"
_PAGE_RULES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("(?i)llava", "(?i)llama-2"), "llava_llama_2"),
    (("(?i)llava", "(?i)mistral|mixtral", "(?i)orca"), "mistral_orca"),
    (("(?i)llava", "(?i)mistral|mixtral", "(?i)hermes"), "chatml_direct"),
    (("(?i)llava", "(?i)mistral|mixtral"), "mistral_instruct"),
    (("(?i)llava-v1\\.6-34b",), "chatml_direct"),
    (("(?i)llava", "(?i)v1", _OTHER_TAGS), "v1_mmtag"),
    (("(?i)llava", "(?i)v1"), "llava_v1"),
    (("(?i)llava", "(?i)mpt"), "mpt"),
    (("(?i)llava", _OTHER_TAGS), "v0_mmtag"),
    (("(?i)llava",), "llava_v0"),
    (("mpt",), "mpt_text"),
    (("llama-2",), "llama_2"),
    ((), "vicuna_v1"),
)
# Of bases for which the page's rules are made; for others, components are asked, which import torch.
LLAVAS_OWN_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_mpt")
# Allowed names of adapters. Names travel in JSON, logs and URLs, and never become paths.
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_label(name: str) -> str:
    """Return the name of an adapter if it is allowed.

    Raises:
        ArgumentsError: it is not.
    """
    if not _LABEL.fullmatch(name):
        raise ArgumentsError(
            f"{name!r} cannot be the name of an adapter: up to 100 letters, digits, '.', '_' and '-', the first a "
            "letter or digit. Give it another name (rename the folder; on a command line NAME=PATH)."
        )
    return name


def label_of(name_or_path: str) -> str:
    """Return the name that an adapter gets from its place: its folder's, with the parent's for a checkpoint.

    Raises:
        ArgumentsError: that is not allowed as a name.
    """
    folder = os.path.expanduser(name_or_path)
    parts = (Path(folder).resolve() if os.path.isdir(folder) else Path(name_or_path)).parts
    last = parts[-1] if parts else ""
    return checked_label(f"{parts[-2]}_{last}" if last.startswith("checkpoint-") and len(parts) > 1 else last)


def split_word(word: str) -> tuple[str | None, str]:
    """Split NAME=PATH into name and path; the name is None if there is none, or if the whole word is a path."""
    name, equals, source = word.partition("=")
    return (name, source) if equals and not os.path.exists(os.path.expanduser(word)) else (None, word)


def read_sources(given: Sequence[str], problems: Problems | None = None) -> dict[str, str]:
    """Return the place of each adapter by name, from the words [NAME=]ADAPTER of a command line.

    Args:
        problems: gets the error, and the other adapters are returned; None: the error is raised.

    Raises:
        ArgumentsError: names are not allowed, or shared by several adapters; the message lists them all.
    """
    sources: dict[str, str] = {}
    wrong = []
    for word in given:
        name, source = split_word(word)
        folder = os.path.expanduser(source)
        source = str(Path(folder).absolute()) if os.path.exists(folder) else source
        try:
            name = label_of(source) if name is None else checked_label(name)
            if name in sources:
                raise ArgumentsError(f"{sources[name]} and {source} are both called {name!r}. Use NAME=PATH.")
            sources[name] = source
        except ArgumentsError as error:
            wrong.append(str(error))
    with _noted(problems):
        if wrong:
            raise ArgumentsError(listing("some adapters have no name of their own", wrong))
    return sources


def locate_all(sources: Mapping[str, AdapterSource], problems: Problems | None = None) -> dict[str, AdapterFolder]:
    """Find every adapter and read its config: this takes a second, loading a model takes minutes.

    Args:
        sources: the place of each adapter by name, as `read_sources` returns it.
        problems: gets the error, and the other adapters are returned; None: the error is raised.

    Raises:
        AdapterError: some places hold no adapter, or a damaged one; the message lists them all.
    """
    folders = {}

    def look(name: str, source: AdapterSource) -> None:
        folder = locate(source)
        _ = folder.config
        folders[name] = folder

    with _noted(problems):
        load_all(look, sources)
    return folders


def _noted(problems: Problems | None) -> AbstractContextManager[None]:
    return nullcontext() if problems is None else problems.noted()


def load_all(load: Callable[[str, Source], object], adapters: Mapping[str, Source]) -> None:
    """Load every adapter with `load`, which takes its name and its place.

    Raises:
        AdapterError: some cannot be loaded; the message lists them all.
    """
    problems = []
    for name, source in adapters.items():
        try:
            load(name, source)
        except SteeringError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError(listing("some adapters cannot be loaded", problems))


def shown_name(name: str, conversation: str | None, base: str) -> str:
    """Return the name under which to register the adapter `name`, so that the page prompts it as it was trained.

    Args:
        conversation: its conversation template; None if unknown: the page then prompts it like the base.
        base: the name under which the base is registered.

    Raises:
        AdapterError: no name makes the page pick this template.
    """
    if conversation is None:
        # This name contains the base's, so the page's rules find the same in it.
        return f"{base}_{harmless(name)}"
    prefix = PAGE_PREFIXES.get(conversation)
    if prefix is None and conversation in component_templates():
        # No name of an adapter has a colon, so the page cannot mistake one for this.
        return f"{conversation}:{harmless(name)}"
    if prefix is None:
        raise AdapterError(
            f"the adapter {name!r} was trained with the conversation template {conversation!r}, which LLaVA's web "
            f"page cannot pick from a model's name; it would prompt it wrongly. The page knows "
            f"{', '.join(PAGE_PREFIXES)}."
        )
    return prefix + harmless(name)


def shown_base(name: str, config: Mapping[str, Any]) -> str:
    """Return the name under which to register a base, so that the page prompts it as it was trained.

    Args:
        name: LLaVA's name for it.
        config: its config.json.
    """
    if str(config.get("model_type")) in LLAVAS_OWN_TYPES:
        return name
    from llava_steering_plugin.components.model_types import of_llava_type  # imports torch

    component = of_llava_type(str(config.get("model_type")))
    return f"{component.version}:{name}" if component and component.version in component.formats() else name


def template_on_page(shown: str) -> str:
    """Return the template in which LLaVA's page asks a model that has no template before a colon in its name."""
    return next(name for words, name in _PAGE_RULES if all(re.search(word, shown) for word in words))


def component_templates() -> set[str]:
    """Return the names of the conversation templates that components bring: our page knows them."""
    from llava_steering_plugin.components.model_types import language_models  # imports torch

    return {name for component in language_models() for name in component.formats()}
