"""Makes the answers of one slot: which of them share a batch, and what happens to those that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.batch import answer_rows
from llava_steering_plugin.serving.generation.prompts import Prompts
from llava_steering_plugin.serving.generation.row import Row, fail_unread
from llava_steering_plugin.serving.generation.slots import Turn

logger = logging.getLogger(__name__)


class Maker:
    """Makes answers with the model of a pool; as many threads as there are slots may call it.

    Args:
        batch: most answers of a turn.
    """

    def __init__(self, prompts: Prompts, batch: int):
        self.prompts = prompts
        self._readers = ThreadPoolExecutor(batch, "reading") if batch > 1 else None

    def __call__(self, turn: Turn) -> None:
        """Make the answers of a turn, but those that it gives back because they cannot be in one batch."""
        rows = [row for row in self._read(turn.answers) if row is not None]
        if not rows:
            return
        together = rows[:1] if rows[0].alone else [row for row in rows if not row.alone]
        others = [row.answer for row in rows if row not in together]
        turn.put_back(others)
        if together:
            answer_rows(self.prompts, together, turn)

    def _read(self, answers: Sequence[Answer]) -> list[Row | None]:
        """Return the rows of answers; None for those that have been ended. Images are unpacked side by side."""
        if self._readers is None or len(answers) == 1:
            return [self._row(answer) for answer in answers]
        return list(self._readers.map(self._row, answers))

    def _row(self, answer: Answer) -> Row | None:
        try:
            row = answer.row if isinstance(answer.row, Row) else self.prompts.row(answer)
            answer.row = row
        except SteeringError as error:
            logger.warning("an answer failed: %s: %s", type(error).__name__, error)
            fail_unread(answer, error)
            return None
        except Exception as error:  # not the others', so they are answered
            logger.exception("an answer failed")
            fail_unread(answer, error)
            return None
        if row is not None:
            row.end_if_cancelled()
        return None if row is None or row.ended else row
