"""Read the command line of this process, for the programs of LLaVA that import hooks do not reach.

`python llava/train/train.py` and `python -m llava.train.train` run train.py as `__main__`. An import hook on
`llava.train.train` never fires then, and LLaVA would refuse the flags of a mode as unknown, so the plugin stops with
the command that works. `llava.serve.model_worker` derives the name of its model from the path, by rules that know no
adapters, inside the module itself; it can be told otherwise by its flag `--model-name` only.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_steering_plugin.errors import SteeringError

TRAIN = "llava.train.train"
WORKER = "llava.serve.model_worker"
# Each of them turns a tuning mode on.
MODE_FLAGS = ("--tuning_mode", "--adapter_path")


@dataclass(frozen=True)
class Start:
    """Says how Python was started: the program (a module's name or a script's path), and the program's arguments."""

    program: str
    is_module: bool
    arguments: tuple[str, ...]

    def runs(self, module: str) -> bool:
        """Return whether the program is this module, also if it was given as the path of a script in any checkout."""
        if self.is_module:
            return self.program == module
        parts = tuple(module.split("."))
        return Path(self.program).resolve().with_suffix("").parts[-len(parts) :] == parts


def read_start(command: Sequence[str]) -> Start | None:
    """Return the program in `sys.orig_argv`, after the interpreter's options; None for -c, standard input or a prompt.

    `sys.argv` does not tell: while `python -m` imports the parent packages, its first item is "-m".
    """
    words = list(command[1:])
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            return Start(word, False, tuple(words))
        if word == "-":
            return None
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                words = words[1:]
            continue
        for position, letter in enumerate(word[1:], start=1):
            if letter == "c":
                return None
            if letter in "mWX":  # takes a value: the rest of this word or the next one
                value = word[position + 1 :] or (words.pop(0) if words else "")
                if letter == "m":
                    return Start(value, True, tuple(words))
                break
    return None


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of `--flag value` or `--flag=value`; None if the flag is absent, "" if it has no value."""
    for position, word in enumerate(arguments):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag:
            return next(iter(arguments[position + 1 : position + 2]), "")
    return None


def refuse_training_as_main(command: Sequence[str]) -> None:
    """Stop if train.py itself is the main program and a flag asks for a tuning mode.

    Raises:
        SystemExit: with the command that works, and without a traceback through `import llava`.
    """
    start = read_start(command)
    if start is None or not start.runs(TRAIN):
        return
    given = next((flag for flag in MODE_FLAGS if flag_value(start.arguments, flag) is not None), None)
    if given is None:
        return
    how = f"-m {start.program}" if start.is_module else start.program
    flags = shlex.join(word for word in start.arguments if not word.startswith(("--local_rank", "--local-rank")))
    raise SystemExit(
        f"{given} has no effect here: `{how}` makes train.py the main program, which no import hook reaches.\n"
        "Run it in this way, with the same flags:\n"
        f"  python -m llava_steering_plugin.launch {TRAIN} {flags}\n"
        f"or, on several GPUs: deepspeed --module llava_steering_plugin.launch {TRAIN} ...\n"
        "llava/train/train_mem.py (flash attention) needs no change: it imports train.py."
    )


def name_the_workers_model(command: Sequence[str], argv: list[str]) -> None:
    """Append `--model-name` to `argv` if a model worker starts with an adapter and no name is given.

    Raises:
        SystemExit: the adapter is damaged, or no name leads to its conversation template; without a traceback.
    """
    start = read_start(command)
    if start is None or not start.runs(WORKER):
        return
    try:
        append_model_name(argv)
    except SteeringError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def append_model_name(argv: list[str]) -> None:
    """Append `--model-name NAME` if `--model-path` is an adapter and the user gave no name."""
    model_path = flag_value(argv, "--model-path")
    if not model_path or flag_value(argv, "--model-name") is not None:
        return
    from llava_steering_plugin.upstream.names import display_name

    name = display_name(model_path)
    if name:
        argv += ["--model-name", name]
