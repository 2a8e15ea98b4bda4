"""The errors this package raises on purpose.

Every message says what is wrong, where, and what to do. Whoever finds several problems reports them in one error
(`listing`), so that a user mends them in one go. The command line turns a SteeringError into one message without a
traceback; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class SteeringError(Exception):
    """Parent of every error that this package raises on purpose."""


class ArgumentsError(SteeringError):
    """Flags or settings that contradict each other, are out of range, or are unknown."""


class AdapterError(SteeringError):
    """An adapter folder that cannot be read, is damaged, or is not ours."""


class BaseMismatch(AdapterError):
    """An adapter that was trained on another base model than the one at hand."""


class CheckpointError(SteeringError):
    """A checkpoint of a training that cannot be written, or from which the training cannot go on."""


class UpstreamError(SteeringError):
    """LLaVA is not there, cannot be patched, or lacks a name that the plugin needs."""


class TokenMapError(SteeringError):
    """Hidden states that no token map describes: steering them would be a guess."""


def listing(headline: str, problems: Sequence[str]) -> str:
    """One message for all problems found: the headline, then one indented line per problem."""
    return "\n".join([f"{headline}:", *(f"  - {problem}" for problem in problems)])
