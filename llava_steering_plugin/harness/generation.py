"""Read the `generation_kwargs` of lmms-eval's tasks, and cut answers where a task says that they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, listing, nearest

# As lmms-eval's own model of LLaVA.
MAX_NEW_TOKENS = 1024
SAMPLING = ("temperature", "top_p", "top_k")
NUMBERS = (*SAMPLING, "repetition_penalty")
# How images are cut is the model's config to say, as in LLaVA's own evaluation.
IGNORED = ("image_aspect_ratio",)
KNOWN = ("max_new_tokens", "do_sample", *NUMBERS, "num_beams", "until", *IGNORED)


@dataclass(frozen=True)
class Generation:
    """Say how answers are generated.

    Attributes:
        arguments: of `generate`.
        until: texts before which an answer ends.
    """

    arguments: dict[str, Any]
    until: tuple[str, ...]

    def cut(self, answer: str) -> str:
        """Return an answer up to the first of the texts that end it."""
        for end in self.until:
            answer = answer.split(end)[0]
        return answer.strip()

    def with_early_end(self, tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of `generate`, which ends early when all answers of a batch hold such a text."""
        if not self.until or self.arguments["num_beams"] > 1:
            return self.arguments
        from transformers import StoppingCriteriaList

        return {**self.arguments, "stopping_criteria": StoppingCriteriaList([_ending(tokenizer, self.until)])}


def read_generation(given: Mapping[str, Any]) -> Generation:
    """Read a task's `generation_kwargs`.

    Tokens are sampled if the temperature is above 0 and `do_sample` is not false.

    Raises:
        ArgumentsError: some are unknown here, or of the wrong kind; the message lists them all.
    """
    problems = [
        f"{name}={given[name]!r}: {nearest(name, KNOWN)}known are {', '.join(KNOWN)}"
        for name in given
        if name not in KNOWN
    ]
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, Sequence) or not all(isinstance(end, str) for end in until):
        problems.append(f"until={given['until']!r} is no text and no list of texts")
        until = ()
    values = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1} | {
        name: value for name, value in given.items() if name in KNOWN and value is not None
    }
    for name in ("max_new_tokens", "num_beams"):
        if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < 1:
            problems.append(f"{name}={values[name]!r} is no number, 1 or more")
    if not isinstance(values.get("do_sample", False), bool):
        problems.append(f"do_sample={values['do_sample']!r} is neither true nor false")
    temperature = values.get("temperature", 1.0 if values.get("do_sample") is True else 0)
    numbers = {"temperature": temperature} | {name: values[name] for name in NUMBERS if name in values}
    problems += [
        f"{name}={number!r} is no number, 0 or more"
        for name, number in numbers.items()
        if not isinstance(number, int | float) or isinstance(number, bool) or number < 0
    ]
    if problems:
        raise ArgumentsError(
            listing("these generation_kwargs of the task, or of --gen_kwargs, cannot be followed", problems)
        )
    sampled = values.get("do_sample") is not False and temperature > 0
    arguments = {
        "max_new_tokens": values["max_new_tokens"],
        "num_beams": values["num_beams"],
        "use_cache": True,
        "do_sample": sampled,
        **({name: values[name] for name in SAMPLING if name in values} if sampled else {}),
        **({"repetition_penalty": values["repetition_penalty"]} if "repetition_penalty" in values else {}),
    }
    return Generation(arguments, tuple(end for end in until if end))


def _ending(tokenizer: Any, until: Sequence[str]) -> Any:
    from transformers import StoppingCriteria

    class Ended(StoppingCriteria):
        """Tells when every answer of a batch holds a text that ends it, or its end."""

        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> bool:
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            ended = (ids == tokenizer.eos_token_id).any(1).tolist()
            return all(done or any(end in text for end in until) for done, text in zip(ended, texts, strict=True))

    return Ended()
