"""Answer the requests of lmms-eval with a model of any kind; everything is checked before the first answer."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, NotFiniteError, listing, shortened
from llava_steering_plugin.harness.arguments import ModelArguments
from llava_steering_plugin.harness.generation import Generation, read_generation
from llava_steering_plugin.harness.items import Documents, Item, ItemAnswers, Request, item_of, questions_of
from llava_steering_plugin.inference.asking.answering import AnswerOptions
from llava_steering_plugin.inference.asking.likelihood import forced, likelihoods
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.models import AnsweringModel

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]


class HarnessAnswers:
    """Answers requests of lmms-eval.

    Args:
        opened: the model.
        documents: of all tasks.
    """

    def __init__(self, opened: AnsweringModel, arguments: ModelArguments, documents: Documents):
        self.opened, self.arguments, self.documents = opened, arguments, documents

    def generated(self, requests: Sequence[Request], progress: Progress) -> list[str]:
        """Return the answers to requests of `generate_until`: text, generation_kwargs, visuals, number, task, split.

        Args:
            progress: called with the number of answers that have come.

        Raises:
            ArgumentsError: some requests cannot be answered; none has been.
            NotFiniteError: logits became NaN or infinite.
        """
        items = [item_of(request, self.documents) for request in requests]
        groups: dict[str, tuple[Generation, list[int]]] = {}
        for number, (_, given, *_) in enumerate(requests):
            groups.setdefault(json.dumps(given, sort_keys=True, default=str), (read_generation(given), []))[1].append(
                number
            )
        questions, sizes = questions_of(items, self.opened.adapter)
        texts, broken = [""] * len(items), []
        asking = self._asking(items, {})
        fitting = self._fitting(asking, questions, sizes, lambda question: asking.prompt_ids(question))
        for generation, numbers in groups.values():
            asked = [number for number in numbers if number in fitting]
            answers = self._asking(items, generation.with_early_end(asking.tokenizer))
            for start, batch, found in answers.batches([questions[number] for number in asked]):
                for number, answer in zip(asked[start:], found, strict=False):
                    texts[number] = generation.cut(answer.text)
                    broken += [f"{items[number].name}: {answer.error}"] if answer.error is not None else []
                progress(len(batch))
        if broken:
            raise NotFiniteError(listing(f"{len(broken)} item(s) have no answer", shortened(broken)))
        return texts

    def likelihoods(self, requests: Sequence[Request], progress: Progress) -> list[tuple[float, bool]]:
        """Return the negative log-likelihood of each answer, and whether it is the greedy one.

        lmms-eval takes the choice with the smallest number, and divides by a choice's length for `acc_norm`. Of sums
        of log-likelihoods these are the measures of the field's other suites.

        Args:
            requests: of `loglikelihood`: text, answer, visuals, number, task, split.
            progress: called with the number of answers that have been scored.

        Raises:
            ArgumentsError: some requests cannot be answered; none has been.
            NotFiniteError: likelihoods became NaN or infinite.
        """
        items = [item_of(request, self.documents) for request in requests]
        wanted = [
            str(answer(item.document()) if callable(answer) else answer)
            for item, (_, answer, *_) in zip(items, requests, strict=True)
        ]
        if nothing := [item.name for item, answer in zip(items, wanted, strict=True) if not answer.strip()]:
            headline = f"{len(nothing)} choice(s) are empty, and an empty one would always be the likeliest"
            raise ArgumentsError(listing(headline, shortened(nothing)))
        questions, sizes = questions_of(items, self.opened.adapter)
        answers = self._asking(items, {})
        to_ids = dict(zip(map(id, questions), wanted, strict=True))
        self._fitting(answers, questions, sizes, lambda each: forced(answers, each, to_ids[id(each)]).ids, refuse=True)
        found: list[tuple[float, bool]] = []
        pairs = list(zip(questions, wanted, strict=True))
        for start in range(0, len(pairs), self.arguments.batch_size):
            batch = pairs[start : start + self.arguments.batch_size]
            found += [(-each.logarithm, each.greedy) for each in likelihoods(answers, batch)]
            progress(len(batch))
        if broken := [item.name for item, (number, _) in zip(items, found, strict=True) if not math.isfinite(number)]:
            headline = f"{len(broken)} choice(s) have no likelihood: the logits became NaN or infinite"
            raise NotFiniteError(listing(headline, shortened(broken)))
        return found

    def _asking(self, items: Sequence[Item], generation: Mapping[str, Any]) -> ItemAnswers:
        named = {item.name: item for item in items}
        wanted = self.arguments
        options = AnswerOptions(wanted.batch_size, wanted.conversation, dict(generation), wanted.seed)
        return ItemAnswers(self.opened.loaded, named, options)

    def _fitting(
        self,
        answers: ItemAnswers,
        questions: Sequence[Question],
        sizes: Sequence[Sequence[tuple[int, int]]],
        ids_of: Callable[[Question], Sequence[int]],
        *,
        refuse: bool = False,
    ) -> set[int]:
        """Return the numbers of the questions that fit into the model's context.

        Args:
            refuse: also where `too_long=empty` is given.

        Raises:
            ArgumentsError: some do not, and are not to be left empty; the message names them.
        """
        tokens = PromptTokens.of_model(answers.model)
        fitting, too_long = set(), []
        for number, (question, of_pictures) in enumerate(zip(questions, sizes, strict=True)):
            most = tokens.context.prompt(bool(question.images))
            length = tokens.count(ids_of(question), of_pictures)
            if most is None or length <= most:
                fitting.add(number)
            else:
                too_long.append(f"{question.id}: {length:,} tokens; the model takes {most:,}")
        if too_long:
            headline = f"{len(too_long)} item(s) are longer than the model's context"
            if refuse or self.arguments.too_long == "refuse":
                advice = "" if refuse else "; too_long=empty in --model_args gives them empty answers"
                raise ArgumentsError(listing(f"{headline}{advice}", shortened(too_long)))
            logger.warning("%s", listing(f"{headline}, and get empty answers", shortened(too_long)))
        return fitting
