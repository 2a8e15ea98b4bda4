"""The errors this package raises on purpose.

Every message says what is wrong, where, and what to do. A check that finds several problems reports them in one error
(`listing`, `Problems`), so that a user can mend them in one go; for an unknown word the error names the nearest known
one (`nearest`). The command line turns a SteeringError into one message without a traceback; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence


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


class DataError(SteeringError):
    """Training data that cannot be read, or that LLaVA cannot be trained on."""


class UpstreamError(SteeringError):
    """LLaVA is not there, cannot be patched, or lacks a name that the plugin needs."""


class TokenMapError(SteeringError):
    """Hidden states that no token map describes: steering them would be a guess."""


class NotFiniteError(SteeringError):
    """A generation in which the logits of every row became NaN or infinite.

    Attributes:
        rows: numbers of the rows.
    """

    def __init__(self, text: str, rows: Sequence[int] = ()):
        super().__init__(text)
        self.rows = tuple(rows)


class NotFiniteWarning(UserWarning):
    """A generation that ended some of its rows, because their logits became NaN or infinite.

    Attributes:
        rows: numbers of these rows.
    """

    def __init__(self, text: str, rows: Sequence[int] = ()):
        super().__init__(text)
        self.rows = tuple(rows)


def listing(headline: str, problems: Sequence[str]) -> str:
    """Return one message for all problems found: the headline, then one indented line per problem."""
    return "\n".join([f"{headline}:", *("  - " + problem.replace("\n", "\n  ") for problem in problems)])


class Noted:
    """A block that ends with a SteeringError at most; the error is put into a list."""

    def __init__(self, errors: list[SteeringError]):
        self._errors = errors

    def __enter__(self) -> None:
        pass

    # A class, for a return type which says that the block may end early.
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SteeringError):
            self._errors.append(error)
            return True
        return False


class Problems:
    """Collects the errors of several checks, each in a block of `noted`, and raises them as one."""

    def __init__(self) -> None:
        self.errors: list[SteeringError] = []

    def noted(self) -> Noted:
        """Return a block whose SteeringError is kept; what follows the block runs in any case."""
        return Noted(self.errors)

    def raise_any(self, headline: str) -> None:
        """Raise what was noted: one error as it is, several as one of the kind that they share.

        Raises:
            SteeringError: something was noted.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            kinds = type(self.errors[0]).__mro__
            kind = next(kind for kind in kinds if all(isinstance(error, kind) for error in self.errors))
            raise kind(listing(headline, list(dict.fromkeys(map(str, self.errors)))))


def shortened(problems: Sequence[str], longest: int = 20) -> list[str]:
    """Keep the first problems and count the others: a large model may have thousands, all of one cause."""
    if len(problems) <= longest:
        return list(problems)
    return [*problems[:longest], f"and {len(problems) - longest} more like these"]


def nearest(word: str, known: Iterable[str], *, spelled: Callable[[str], str] = repr, at_most: int = 1) -> str:
    """Return "did you mean 'x'? " with the known words most like `word`; the empty string if none is like it.

    The hint ends with a space, so that the next sentence of a message can follow it directly.

    Args:
        word: as the user wrote it.
        known: the words that are accepted.
        spelled: how a known word is shown, in quotes by default.
        at_most: the largest number of words shown, the most similar first.
    """
    similar = difflib.get_close_matches(word, list(known), n=at_most)
    return f"did you mean {' or '.join(map(spelled, similar))}? " if similar else ""
