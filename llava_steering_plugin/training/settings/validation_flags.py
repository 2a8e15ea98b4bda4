"""Check the flags of a validation while training: --eval_data_path, which is ours, and what transformers has for it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = "eval_data_path"
HELP = (
    "with a tuning mode: samples to validate on while training, a file like that of --data_path, with its images in "
    "--image_folder; for --evaluation_strategy steps or epoch, --load_best_model_at_end and --do_eval"
)
LOSS = ("loss", "eval_loss")
NO, STEPS, EPOCH = "no", "steps", "epoch"


def strategy(flags: Any) -> str:
    """Return --evaluation_strategy as a word, whichever form and name transformers has given it."""
    return _word(getattr(flags, name_of_strategy(flags), NO))


def name_of_strategy(flags: Any) -> str:
    """Return the name of that flag: transformers 4.41 calls it `eval_strategy`, and 4.51 knows no other name."""
    older = "evaluation_strategy"
    return "eval_strategy" if getattr(flags, older, None) is None else older


def validation_problems(flags: Namespace) -> list[str]:
    """Return what keeps a training with a tuning mode from validating as its flags ask."""
    name = name_of_strategy(flags)
    if not hasattr(flags, name):
        return []
    path, when = getattr(flags, DATA, None), strategy(flags)
    asked = _asking(flags, when)
    if asked and not path:
        return [
            f"{_joined(asked)} cannot be combined with a tuning mode without samples to validate on: give a file like "
            f"that of --data_path with --{DATA} FILE. LLaVA itself has none, and cannot evaluate while it trains"
        ]
    problems = _best_model(flags, when)
    if path:
        problems += _file_problems(str(path))
    if path and not asked:
        problems.append(
            f"--{DATA} {path} has no effect: add --{name} {STEPS} or {EPOCH}, or --do_eval True to "
            "evaluate once, at the end"
        )
    if flags.eval_steps is not None and (when == NO or flags.eval_steps < 0):
        problems.append(
            f"--eval_steps {flags.eval_steps:g} has no effect without --{name} {STEPS}"
            if when == NO
            else f"--eval_steps is {flags.eval_steps:g}; it must be at least 1, or a share of the training below 1"
        )
    return problems


def _asking(flags: Namespace, when: str) -> list[str]:
    """Return the flags that ask for an evaluation."""
    asked = [f"--{name_of_strategy(flags)} {when}"] if when != NO else []
    asked += [f"--{name}" for name in ("do_eval", "load_best_model_at_end") if getattr(flags, name)]
    if _word(flags.lr_scheduler_type) == "reduce_lr_on_plateau":
        asked.append("--lr_scheduler_type reduce_lr_on_plateau")
    return asked


def _best_model(flags: Namespace, when: str) -> list[str]:
    problems = []
    metric = flags.metric_for_best_model
    if metric is not None and metric not in LOSS:
        problems.append(f"--metric_for_best_model {metric} is unknown: a validation computes {' = '.join(LOSS)} alone")
    elif metric is not None and when == NO:
        problems.append(f"--metric_for_best_model {metric} has no effect without --{name_of_strategy(flags)}")
    if flags.greater_is_better:
        problems.append("--greater_is_better True would keep the worst checkpoint: the smaller loss is the better one")
    saved = _word(flags.save_strategy)
    if not flags.load_best_model_at_end:
        return problems
    if when != saved:
        problems.append(
            f"--load_best_model_at_end needs a checkpoint for each evaluation: --{name_of_strategy(flags)} is {when} "
            f"and --save_strategy {saved}"
        )
    elif when == STEPS:
        every, saving = flags.eval_steps or flags.logging_steps, flags.save_steps
        # In millionths, as shares of a training are given: 0.3 % 0.1 is not 0.
        if (every < 1) != (saving < 1) or (every > 0 and round(saving * 1e6) % round(every * 1e6)):
            problems.append(
                f"--load_best_model_at_end needs --save_steps to be a multiple of --eval_steps; they are {saving:g} "
                f"and {every:g}"
            )
    return problems


def _file_problems(path: str) -> list[str]:
    """Return what is wrong with a file of samples as a whole."""
    try:
        samples = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return [f"--{DATA} {path} cannot be read: {error.strerror}"]
    except (ValueError, RecursionError) as error:
        return [f"--{DATA} {path} is no JSON: {error}"]
    if not isinstance(samples, list) or not samples:
        return [f"--{DATA} {path} holds no list of samples, such as the file of --data_path"]
    return []


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
