"""Read the requests of lmms-eval: the text and the pictures of each item, as questions to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
from llava_steering_plugin.inference.asking.questions import IMAGE_MARK, Question
from llava_steering_plugin.inference.base_model import LoadedBase
from llava_steering_plugin.inference.images import large_enough

# A task's documents by split and number, as lmms-eval hands them to its models.
Documents = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
# The arguments of a request: text, generation_kwargs or an answer, what returns the pictures, number, task, split.
Request = tuple[Any, Any, Any, Any, str, str]


@dataclass(frozen=True)
class Item:
    """One item of a task.

    Attributes:
        text: what is asked.
        show: returns the task's pictures of a document.
    """

    task: str
    number: Any
    text: str
    show: Any
    document: Any

    @property
    def name(self) -> str:
        """Return how messages call it."""
        return f"{self.task}/{self.number}"

    def pictures(self) -> list[Image.Image]:
        """Return the item's pictures, in RGB.

        Raises:
            ArgumentsError: it has something else than pictures, such as a video, or one that is too small.
        """
        shown = self.show(self.document()) if callable(self.show) else None
        shown = [shown] if isinstance(shown, Image.Image) else list(shown or ())
        if any(each is None for each in shown):  # as lmms-eval's own models: then there are none
            return []
        if strange := [type(each).__name__ for each in shown if not isinstance(each, Image.Image)]:
            raise ArgumentsError(
                f"{self.name} has a {strange[0]} where a picture should be: LLaVA takes pictures alone."
            )
        return [large_enough(each.convert("RGB"), f"a picture of {self.name}") for each in shown]


def item_of(request: Request, documents: Documents) -> Item:
    """Return the item that a request of lmms-eval is about."""
    text, _, show, number, task, split = request
    said = text[0] if isinstance(text, list) else text
    return Item(task, number, str(said), show, lambda: documents[task][split][number])


class ItemAnswers(BatchAnswers):
    """Answers items of lmms-eval as `llava-steering eval` answers questions.

    Args:
        items: by the name that their questions have.
    """

    def __init__(self, loaded: LoadedBase, items: Mapping[str, Item], options: AnswerOptions):
        super().__init__(loaded, Path(), options)
        self.items = items

    def opened(self, question: Question) -> list[Image.Image]:
        """Return the pictures of the item that a question comes from."""
        return self.items[question.id].pictures()


def questions_of(items: Iterable[Item], adapter: str) -> tuple[list[Question], list[list[tuple[int, int]]]]:
    """Return items as questions to a model, and the sizes of their pictures.

    Raises:
        ArgumentsError: some cannot be asked; the message lists them.
    """
    questions: list[Question] = []
    sizes: list[list[tuple[int, int]]] = []
    problems: list[str] = []
    before, pictures = None, list[Image.Image]()
    for item in items:
        try:
            if item.name != before:  # choices of one item come one after the other
                before, pictures = item.name, item.pictures()
        except ArgumentsError as error:
            problems.append(str(error))
            before = None
            continue
        marks = item.text.count(IMAGE_MARK)
        if marks not in (0, len(pictures)):
            problems.append(f"{item.name} has {len(pictures)} picture(s), and {marks} {IMAGE_MARK} in its text")
            continue
        names = tuple(str(number) for number in range(len(pictures)))
        questions.append(Question(item.name, item.text, names, adapter))
        sizes.append([picture.size for picture in pictures])
    if problems:
        raise ArgumentsError(listing("some items cannot be asked", shortened(problems)))
    return questions, sizes
