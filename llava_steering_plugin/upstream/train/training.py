"""Extend `llava.train.train` when it has been imported. Without a tuning mode, it behaves as before."""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from wrapt import wrap_function_wrapper

from llava_steering_plugin.adapters.fit.base_model import language_model, read_config
from llava_steering_plugin.adapters.fit.compatibility import misfits
from llava_steering_plugin.convert.torch_files import tensors_in
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing, nearest
from llava_steering_plugin.training.attaching import REQUEST
from llava_steering_plugin.training.data.source import early_problem
from llava_steering_plugin.training.process_group import leave_at_exit
from llava_steering_plugin.training.saving.resuming import folder_problems
from llava_steering_plugin.training.settings.conflicts import DATA_PARALLEL, cpu_flag, packing_problems
from llava_steering_plugin.training.settings.flags import (
    CANNOT_START,
    TrainingRequest,
    extended,
    mode_is_on,
    read_request,
)
from llava_steering_plugin.training.settings.trainer_flags import machine_problems
from llava_steering_plugin.upstream.model.component_checks import component_problems
from llava_steering_plugin.upstream.model.language_models import in_training
from llava_steering_plugin.upstream.seams import require
from llava_steering_plugin.upstream.text.chat_templates import OF_TOKENIZER
from llava_steering_plugin.upstream.text.tokenizers import attend_to_ends
from llava_steering_plugin.upstream.train import forks
from llava_steering_plugin.upstream.train.newer_transformers import below_llavas_trainer
from llava_steering_plugin.upstream.train.samples import refuse_bad_data, with_source
from llava_steering_plugin.upstream.train.targets import of_any_tokenizer
from llava_steering_plugin.upstream.train.trained_base import TrainedBase
from llava_steering_plugin.upstream.train.trainer import LlavaTrainerMixin

# Values of --version that LLaVA's train() knows without a conversation template of that name.
TEMPLATES_OF_VERSIONS = ("v0", "v0.5")
# What LLaVA calls the rows of tokens that stage 1 has trained.
_ROWS = "model.embed_tokens.weight"


def on_train_import(module: ModuleType) -> None:
    """Add the flags, the check of the command line, the trainer and the saving of adapters."""
    original = require(module, "LLaVATrainer")
    names: dict[str, Any] = module.__dict__
    bases = (LlavaTrainerMixin, original, *below_llavas_trainer())
    names["LLaVATrainer"] = type(original.__name__, bases, {"__module__": original.__module__})
    names["TrainingArguments"] = extended(require(module, "TrainingArguments"))
    require(module, "safe_save_model_for_hf_trainer")
    wrap_function_wrapper(module, "safe_save_model_for_hf_trainer", _save)
    require(module, "LazySupervisedDataset")
    wrap_function_wrapper(module, "LazySupervisedDataset.__init__", with_source)
    require(module, "preprocess")
    wrap_function_wrapper(module, "preprocess", of_any_tokenizer)
    require(module, "DataCollatorForSupervisedDataset")
    wrap_function_wrapper(module, "DataCollatorForSupervisedDataset.__call__", attend_to_ends)
    require(module, "train")
    wrap_function_wrapper(module, "train", _checked(module))


def flag_classes(module: ModuleType) -> tuple[type, type, type]:
    """Return the dataclasses that declare the flags of `llava.train.train`, the module.

    Raises:
        UpstreamError: this LLaVA lacks one.
    """
    return require(module, "ModelArguments"), require(module, "DataArguments"), require(module, "TrainingArguments")


def _save(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trainer = args[0] if args else kwargs["trainer"]
    if not mode_is_on(trainer.args):
        return original(*args, **kwargs)
    return trainer.save_model(args[1] if len(args) > 1 else kwargs["output_dir"])


def _checked(module: ModuleType) -> Callable[..., Any]:
    def train(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = read_request(flag_classes(module), sys.argv[1:])
        base = TrainedBase.of(request.flags, sys.argv[1:])
        problems = [*request.problems, *base.problems, *_component_problems(request), *_problems_here(request)]
        if mode_is_on(request.flags):
            problems += forks.problems_of_fork(request.flags, forks.folder_of(module), base.described)
        if problems:
            _exit(ArgumentsError(listing(CANNOT_START, problems)), every_rank=False)
        token = REQUEST.set(request)
        try:
            if mode_is_on(request.flags):
                refuse_bad_data(request.flags)
            with in_training(module, base.component), _with_a_mode(module, request.flags, base):
                trained = original(*args, **kwargs)
        except SteeringError as error:
            _exit(error, every_rank=True)
        finally:
            REQUEST.reset(token)
        leave_at_exit()
        return trained

    return train


@contextlib.contextmanager
def _with_a_mode(module: ModuleType, flags: Namespace, base: TrainedBase) -> Iterator[None]:
    if not mode_is_on(flags):
        yield
        return
    with forks.with_own_config(module, flags, base.described), _command_line(forks.mapped(sys.argv)):
        yield


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _component_problems(request: TrainingRequest) -> list[str]:
    """Return what is wrong with vision tower and connector, with a tuning mode and without one."""
    base = request.flags.model_name_or_path
    described = None
    if os.path.isdir(base or ""):
        with contextlib.suppress(SteeringError):  # what is wrong is said by the code that loads the base
            described = read_config(base)
    return component_problems(request.flags, described)


def problems_of(request: TrainingRequest) -> list[str]:
    """Return why a training would not start, as far as its flags, its base and this machine tell; any training.

    Of one without a mode LLaVA itself says less, and later. How many GPUs its process will see is not known here.
    """
    flags = request.flags
    found = [
        *request.problems,
        *_component_problems(request),
        *_misfits(request),
        *early_problem(getattr(flags, "data_path", None)),
        *_of_llava(flags),
        *machine_problems(flags),
        *packing_problems(flags),
    ]
    return [*found, *folder_problems(flags)] if mode_is_on(flags) else found


def _problems_here(request: TrainingRequest) -> list[str]:
    """Return what base and machine tell before a model is loaded."""
    if not mode_is_on(request.flags):
        return []
    flags = request.flags
    data = early_problem(getattr(flags, "data_path", None))
    return [
        *_misfits(request),
        *_data_parallel(flags),
        *data,
        *_of_llava(flags),
        *machine_problems(flags),
        *packing_problems(flags),
        *folder_problems(flags),
    ]


def _of_llava(flags: Namespace) -> list[str]:
    """Return what LLaVA's own flags lack, which it would notice late or not at all."""
    problems = []
    if not flags.vision_tower:
        problems.append(
            "--vision_tower is missing: LLaVA would train a plain language model, without images and projector"
        )
    problems += _markers(flags)
    templates = [*TEMPLATES_OF_VERSIONS, *sys.modules["llava.conversation"].conv_templates]
    if flags.version not in (*templates, OF_TOKENIZER):  # of the latter, `TrainedBase` says what is wrong
        hint = nearest(str(flags.version), templates)
        problems.append(f"--version {flags.version} is no conversation template; {hint}LLaVA would take vicuna_v1")
    return problems


def _markers(flags: Namespace) -> list[str]:
    """Return why LLaVA would find no rows for the tokens around an image: it looks for them beside the projector's."""
    file = getattr(flags, "pretrain_mm_mlp_adapter", None)
    if not (getattr(flags, "mm_use_im_start_end", False) and file and os.path.isfile(file)):
        return []
    try:
        if _ROWS in tensors_in(Path(file)):
            return []
    except SteeringError:
        return []  # said by the code that loads it
    return [
        f"--mm_use_im_start_end True takes the rows of its two tokens from --pretrain_mm_mlp_adapter, and {file} has "
        f"none ({_ROWS}): it comes from a stage 1 without that flag. Leave the flag out, or give it in both"
    ]


def _misfits(request: TrainingRequest) -> list[str]:
    """Return the settings that do not fit a base in a folder; a base on the hub is not fetched for that."""
    base = request.flags.model_name_or_path
    if request.mode is None or not os.path.isdir(base or ""):
        return []
    try:
        return [f"--{problem}" for problem in misfits(language_model(read_config(base), base), request.mode)]
    except SteeringError:
        return []  # what is wrong is said already, or by the code that loads the base


def _data_parallel(flags: Namespace) -> list[str]:
    """Return the problem that several GPUs without a launcher are: transformers then uses nn.DataParallel."""
    launched = "LOCAL_RANK" in os.environ or flags.local_rank != -1 or flags.deepspeed
    count = 0 if launched or cpu_flag(flags) else torch.cuda.device_count()
    return [DATA_PARALLEL.format(count)] if count > 1 else []


def _exit(error: SteeringError, *, every_rank: bool) -> NoReturn:
    """End the process as argparse would: the message on standard error, exit status 2, no traceback.

    Args:
        error: what is wrong.
        every_rank: print it on every rank, because other ranks may have another error; otherwise on rank 0 only.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or every_rank:
        sys.stderr.write(f"error{f' (rank {rank})' if every_rank and rank else ''}: {error}\n")
    raise SystemExit(2) from error
