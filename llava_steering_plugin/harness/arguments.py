"""Read what `--model_args` says, and check all that it tells before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, Problems, SteeringError, nearest
from llava_steering_plugin.inference.options import check_bits, choose_device

NAMES = ("adapter", "base", "conversation", "load_4bit", "load_8bit", "device", "seed", "too_long")
TOO_LONG = ("refuse", "empty")
_WORDS = {"true": True, "1": True, "false": False, "0": False}
# What messages of this package call the arguments elsewhere.
_FLAGS = {
    "--model-base": "base=",
    "--conv-mode": "conversation=",
    "--load-4bit": "load_4bit=True",
    "--load-8bit": "load_8bit=True",
    "--device ": "device=",
    "--device": "device=",
}


@dataclass(frozen=True)
class ModelArguments:
    """Say which model answers, and how.

    Attributes:
        path: of an adapter, a LoRA or a base: folder or hub id.
        base: where the base of an adapter or a LoRA is, if not where it says.
        conversation: LLaVA's template; None: the adapter's own.
        seed: of random numbers, where tokens are sampled.
        too_long: what becomes of items that are longer than the model's context: "refuse" ends the run before the
            first answer, "empty" gives them empty answers.
    """

    path: str
    base: str | None
    conversation: str | None
    load_4bit: bool
    load_8bit: bool
    device: str
    batch_size: int
    seed: int
    too_long: str

    @property
    def how(self) -> dict[str, Any]:
        """Return the arguments of `open_model`."""
        return {"device": self.device, "load_4bit": self.load_4bit, "load_8bit": self.load_8bit}


def split_arguments(text: str) -> dict[str, str]:
    """Return the arguments in `name=value,name=value`.

    Raises:
        ArgumentsError: a word is no argument, or one comes twice.
    """
    found: dict[str, str] = {}
    problems = Problems()
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, equals, value = word.partition("=")
        with problems.noted():
            if not equals or not value:
                raise ArgumentsError(f"{word!r} is not name=value; the names are {', '.join(NAMES)}.")
            if name in found:
                raise ArgumentsError(f"{name} is given twice: {found[name]} and {value}.")
            found[name] = value
    problems.raise_any(f"--model_args {text} cannot be read")
    return found


def check_arguments(given: Mapping[str, Any], *, batch_size: Any = 1, device: str | None = None) -> ModelArguments:
    """Return checked arguments: whatever names, values and files tell is found out before anything is loaded.

    Args:
        given: the arguments by name, as text or as plain values.
        batch_size: lmms-eval's `--batch_size`.
        device: lmms-eval's `--device`.

    Raises:
        SteeringError: something is wrong; the message lists it all.
    """
    problems = Problems()
    for name in given:
        if name not in NAMES:
            with problems.noted():
                raise ArgumentsError(_unknown(name))
    texts = {name: str(value) for name, value in given.items() if value is not None}
    bits = {name: _boolean(name, texts.get(name, "false"), problems) for name in ("load_4bit", "load_8bit")}
    with problems.noted():
        check_bits(**bits, device=texts.get("device") or device or "auto")
    read = ModelArguments(
        texts.get("adapter") or texts.get("base", ""),
        texts.get("base") if "adapter" in texts else None,
        texts.get("conversation"),
        **bits,
        device=_device(texts.get("device"), device, problems),
        batch_size=_batch_size(batch_size, problems),
        seed=_whole("seed", texts.get("seed", "0"), problems),
        too_long=_one_of("too_long", texts.get("too_long", TOO_LONG[0]), problems),
    )
    _check_model(read, texts, problems)
    try:
        problems.raise_any("these --model_args cannot be used")
    except SteeringError as error:
        raise type(error)(as_arguments(str(error))) from None
    return read


def as_arguments(text: str) -> str:
    """Return a message of this package with the names that its advice has in `--model_args`."""
    for flag, name in _FLAGS.items():
        text = text.replace(flag, name)
    return text


def _unknown(name: str) -> str:
    if name in ("batch_size", "max_batch_size"):
        return f"{name} is no argument of the model: give lmms-eval --batch_size N."
    return f"unknown argument {name!r}: {nearest(name, NAMES)}There are {', '.join(NAMES)}."


def _check_model(read: ModelArguments, given: Mapping[str, str], problems: Problems) -> None:
    """Check LLaVA, the conversation template, adapter and base."""
    from llava_steering_plugin.adapters.stored.locate import find
    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.inference.models import check_model
    from llava_steering_plugin.upstream.install import install
    from llava_steering_plugin.upstream.text.conversations import checked_template

    there = False
    with problems.noted():
        find_llava()  # its error says what to do if there is none
        there = True
        install()
        if read.conversation is not None:
            checked_template(read.conversation)
    with problems.noted():
        if not read.path and given.keys() - set(NAMES):
            return  # what was meant for it has been named
        if not read.path:
            raise ArgumentsError("there is neither adapter= nor base=: give a folder or a hub id, or both.")
        if "base" in given and find(given["base"]) is not None:
            raise ArgumentsError(f"base={given['base']} is an adapter: give it as adapter=.")
        if there:
            check_model(read.path, read.base, bases="adapter" not in given)


def _boolean(name: str, text: str, problems: Problems) -> bool:
    with problems.noted():
        if text.lower() not in _WORDS:
            raise ArgumentsError(f"{name}={text} is neither True nor False.")
    return _WORDS.get(text.lower(), False)


def _whole(name: str, text: str, problems: Problems) -> int:
    with problems.noted():
        try:
            return int(text)
        except ValueError:
            raise ArgumentsError(f"{name}={text} is no whole number.") from None
    return 0


def _batch_size(given: Any, problems: Problems) -> int:
    text = str(given)
    with problems.noted():
        if not text.isdecimal() or int(text) < 1:
            raise ArgumentsError(
                f"--batch_size {text} is no number of items: give one, 1 or more; 'auto' is not known."
            )
        return int(text)
    return 1


def _one_of(name: str, text: str, problems: Problems) -> str:
    with problems.noted():
        if text not in TOO_LONG:
            raise ArgumentsError(f"{name}={text}: {nearest(text, TOO_LONG)}It is {' or '.join(TOO_LONG)}.")
    return text


def _device(named: str | None, flag: str | None, problems: Problems) -> str:
    """Return the device: the one that is asked for, or this process's GPU where lmms-eval runs in several."""
    wanted = named or flag or "auto"
    with problems.noted():
        if named and flag and named != flag:
            raise ArgumentsError(f"two devices are given: {flag} to lmms-eval, and device={named}. Give one of them.")
        chosen = choose_device(wanted)
        import torch

        if chosen == "cpu" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # LLaVA's loader would put the vision tower on a GPU, and CUDA looks for GPUs once.
            raise ArgumentsError(
                "device=cpu comes too late, for lmms-eval uses a GPU: start it with CUDA_VISIBLE_DEVICES= ."
            )
        if chosen == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return chosen
    return "cpu"
