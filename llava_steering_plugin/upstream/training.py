"""Training: what changes in `llava.train.train` once it is imported. Without a tuning mode nothing does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt import wrap_function_wrapper

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.upstream import arguments
from llava_steering_plugin.upstream.dialects import require
from llava_steering_plugin.upstream.trainer import COMMAND_LINE, SteeringTrainerMixin


def on_train_import(module: ModuleType) -> None:
    """Adds the flags, the check of the command line, the trainer and the saving of adapters."""
    original = require(module, "LLaVATrainer")
    ours: dict[str, Any] = module.__dict__
    ours["LLaVATrainer"] = type(
        original.__name__, (SteeringTrainerMixin, original), {"__module__": original.__module__}
    )
    ours["TrainingArguments"] = arguments.extended(require(module, "TrainingArguments"))
    require(module, "safe_save_model_for_hf_trainer")
    wrap_function_wrapper(module, "safe_save_model_for_hf_trainer", _save)
    require(module, "train")
    wrap_function_wrapper(module, "train", _checked(module))


def _save(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trainer = args[0] if args else kwargs["trainer"]
    if not arguments.active(trainer.args):
        return original(*args, **kwargs)
    return trainer.save_model(args[1] if len(args) > 1 else kwargs["output_dir"])


def _checked(module: ModuleType) -> Callable[..., Any]:
    def train(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flags, unknown = arguments.read_command_line(module, sys.argv[1:])
        try:
            arguments.check(flags, unknown)
        except SteeringError as error:
            arguments.fail(error, every_rank=False)
        token = COMMAND_LINE.set(flags)
        try:
            return original(*args, **kwargs)
        except SteeringError as error:
            arguments.fail(error, every_rank=True)
        finally:
            COMMAND_LINE.reset(token)

    return train
