"""The conversation templates that LLaVA has."""

from __future__ import annotations

import difflib

from llava_steering_plugin.errors import ArgumentsError


def checked_template(name: str) -> str:
    """The name of a template.

    Raises:
        ArgumentsError: LLaVA has none of that name.
        ImportError: there is no LLaVA to ask.
    """
    from llava.conversation import conv_templates

    if name not in conv_templates:
        near = difflib.get_close_matches(name, conv_templates, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ArgumentsError(f"unknown conversation template {name!r}: {hint}LLaVA has {', '.join(conv_templates)}")
    return name
