"""Gives adapters the names by which they are asked: one on LLaVA's page, and one in the API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.sources import shown_name


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is served: its name, its names on the page and in the API, and where it came from.

    In the API it has its own name. It may be the base's, if the page shows it under another one, which it then has in
    the API, too.
    """

    name: str
    shown: str
    id: str
    source: str


def named(
    name: str, source: str, conversation: str | None, base: str, others: Iterable[ServedAdapter]
) -> ServedAdapter:
    """Return the adapter `name` with names that neither the base nor other adapters have.

    Args:
        conversation: its conversation template; None if unknown.
        base: the name of the base.
        others: adapters beside it; one of its own name is none, which it replaces.

    Raises:
        AdapterError: the page could not prompt it as it was trained.
        ArgumentsError: one of its names is taken.
    """
    shown = shown_name(name, conversation, base)
    adapter = ServedAdapter(name, shown, name if name != base else shown, source)
    on_page, in_api = {base: "the base"}, {base: "the base"}
    for other in others:
        if other.name != name:
            on_page[other.shown] = in_api[other.id] = f"the adapter {other.name!r}"
    for word, taken, how in ((adapter.shown, on_page, "shown as"), (adapter.id, in_api, "called in the API")):
        if word in taken:
            raise ArgumentsError(
                f"the adapter {name!r} ({source}) would be {how} {word!r}, the name of {taken[word]}. "
                "Give it another name (rename the folder; on a command line NAME=PATH)."
            )
    return adapter
