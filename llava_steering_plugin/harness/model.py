"""The model of lmms-eval: a base, an adapter of any mode or a LoRA, which answers as `llava-steering eval` does."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from lmms_eval.api.model import lmms

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.harness.arguments import ModelArguments, as_arguments, check_arguments, split_arguments


class LlavaSteering(lmms):
    """Answers tasks of lmms-eval with a LLaVA and an adapter.

    Args:
        adapter: an adapter, or an unmerged LoRA of LLaVA's own training: folder or hub id.
        base: its base, if not where it says; without an adapter, the model that answers.
        batch_size: items answered at the same time.
        others: `device`, `conversation`, `load_4bit`, `load_8bit`, `seed`, `too_long`.
        arguments: all of these, checked already.

    Raises:
        SteeringError: the model cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        adapter: str | None = None,
        base: str | None = None,
        *,
        batch_size: int | str = 1,
        arguments: ModelArguments | None = None,
        **others: Any,
    ):
        super().__init__()
        given = {"adapter": adapter, "base": base, **others}
        self.arguments = arguments or check_arguments(
            {name: value for name, value in given.items() if value is not None}, batch_size=batch_size
        )
        from llava_steering_plugin.inference.models import open_model

        self.opened = open_model(self.arguments.path, self.arguments.base, self.arguments.how)
        self._ends_the_program = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LlavaSteering:
        """Load the model that `--model_args` names; what goes wrong, also later, ends the program.

        lmms-eval's own program prints an exception, and exits as if nothing were wrong.

        Raises:
            SystemExit: it cannot be loaded.
        """
        settings = {name: value for name, value in (additional_config or {}).items() if value is not None}
        with _program_ends():
            if settings.pop("max_batch_size", None) is not None:
                raise ArgumentsError("--max_batch_size is for --batch_size auto, which is not known: give a number.")
            made = cls(arguments=check_arguments(split_arguments(arg_string), **settings))
        made._ends_the_program = True
        return made

    @property
    def device(self) -> Any:
        """Return the device that the model is on."""
        return self.opened.loaded.pool.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answers to requests.

        Raises:
            SteeringError: some cannot be answered.
        """
        answers: list[str] = self._answered("Answering", requests, lambda answering: answering.generated)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Return the negative log-likelihood of given answers, and whether each is the greedy one.

        Raises:
            SteeringError: some cannot be scored.
        """
        from lmms_eval.api.instance import GenerationResult

        scores = self._answered("Scoring", requests, lambda answering: answering.likelihoods)
        return [GenerationResult(score) for score in scores]  # lmms-eval 0.7.3 makes text of a bare pair

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Refuse tasks of several rounds.

        Raises:
            SteeringError: always.
        """
        with self._failures():
            raise ArgumentsError(
                "tasks of several rounds (generate_until_multi_round) are not answered: `llava-steering eval`, whose "
                "prompts and answers these are, asks single questions."
            )

    def generate_visual_cot(self, requests: list[Any]) -> NoReturn:
        """Refuse tasks in which the model draws.

        Raises:
            SteeringError: always.
        """
        with self._failures():
            raise ArgumentsError("tasks with visual_cot are not answered: LLaVA makes no pictures.")

    def _answered(self, what: str, requests: Sequence[Any], how: Callable[[Any], Callable[..., Any]]) -> Any:
        from tqdm import tqdm

        from llava_steering_plugin.harness.answers import HarnessAnswers

        with self._failures(), tqdm(total=len(requests), desc=what, disable=self.rank != 0) as shown:
            answers = HarnessAnswers(self.opened, self.arguments, self.task_dict)
            return how(answers)([request.args for request in requests], shown.update)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        if self._ends_the_program:
            with _program_ends():
                yield
        else:
            yield


@contextmanager
def _program_ends() -> Iterator[None]:
    """End the program with what is raised inside the block, which lmms-eval would print and pass over.

    Raises:
        SystemExit: something was raised.
    """
    try:
        yield
    except SteeringError as error:
        raise SystemExit(f"llava_steering: {as_arguments(str(error))}") from error
    except Exception as error:  # a bug, or a device without memory: with its traceback
        traceback.print_exc(file=sys.stderr)
        raise SystemExit(1) from error
