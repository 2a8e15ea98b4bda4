"""The flags: every registered mode's settings as `--<mode>_<setting>`, and one check of the whole command line."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn, get_args, get_type_hints

from llava_steering_plugin.adapters import folder as files
from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.errors import AdapterError, ArgumentsError, SteeringError, nearest
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.training.deepspeed_config import ZERO, read_deepspeed

NONE = "none"
CANNOT_START = "this training cannot start"
DATA_PARALLEL = (
    "{0} GPUs in one process (nn.DataParallel) lose the token map. Start one process per GPU: "
    "torchrun --nproc_per_node {0} ... or deepspeed ..., or show one only (CUDA_VISIBLE_DEVICES=0)"
)
# Also with the dashes that text processors make of two hyphens; what follows a flag may be a negative number.
_FLAG = re.compile("[-–—]+[A-Za-z]")
NO_FSDP = "FSDP flattens adapter parameters together with frozen ones; use DeepSpeed ZeRO or plain DDP"


def extended(original: type) -> type:
    """Upstream's TrainingArguments with our flags, under its own name: its pickles load where we are not installed."""
    modes = registry.loadable()
    fields: list[tuple[str, Any, Any]] = [
        ("tuning_mode", str, _flag(NONE, f"parameter-efficient tuning mode: {NONE}, {', '.join(modes)}")),
        ("adapter_path", str | None, _flag(None, "continue training from this adapter (folder or hub id)")),
    ]
    for mode in modes.values():
        fields += _flags_of(mode)
    taken = {field.name for field in dataclasses.fields(original)}
    if clashes := sorted(taken & {name for name, _, _ in fields}):
        raise SteeringError(
            f"the flags --{', --'.join(clashes)} exist in this LLaVA already; rename the mode's settings."
        )
    new = dataclasses.make_dataclass(original.__name__, fields, bases=(original,))
    new.__module__, new.__qualname__, new.__doc__ = original.__module__, original.__qualname__, original.__doc__
    return new


def _flags_of(mode: type[Mode]) -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(mode)
    flags = []
    for field in dataclasses.fields(mode):
        kind = hints[field.name]
        optional = kind if type(None) in get_args(kind) else kind | None
        # None stands for "not given": only so can flags of another mode be told apart from defaults.
        text = f"{mode.name}: {field.metadata.get('help', field.name)} (default: {field.default})".replace("%", "%%")
        flags.append((f"{mode.name}_{field.name}", optional, _flag(None, text)))
    return flags


def _flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def active(arguments: Any) -> bool:
    """Whether a tuning mode is on."""
    return getattr(arguments, "tuning_mode", NONE) not in (None, NONE) or bool(getattr(arguments, "adapter_path", None))


def given_settings(arguments: Any, mode: str) -> dict[str, Any]:
    """The settings of `mode` that were given as flags."""
    values = {
        field.name: getattr(arguments, f"{mode}_{field.name}", None) for field in dataclasses.fields(registry.get(mode))
    }
    return {name: value for name, value in values.items() if value is not None}


def mode_from(arguments: Any) -> Mode:
    """The mode that the flags describe; with --adapter_path, the one that the adapter was trained with.

    Raises:
        AdapterError: the adapter is missing or damaged.
        ArgumentsError: unknown mode, or one that is installed in a version without the adapter's settings.
    """
    if arguments.adapter_path:
        config = _config_at(arguments.adapter_path)
        return registry.configured(config.mode, config.settings)
    return registry.get(arguments.tuning_mode)(**given_settings(arguments, arguments.tuning_mode))


def _config_at(path: str) -> AdapterConfig:
    return files.read_config(files.find(path) or _none_at(path))


def _none_at(path: str) -> Any:
    # Reading says what exactly is wrong with what is there.
    files.read(path)
    raise AdapterError(f"{path} is no adapter of this plugin.")


def read_command_line(
    module: ModuleType, words: Sequence[str], usage: str | None = None
) -> tuple[Namespace, list[str]]:
    """All flags as upstream's train() will parse them, without acting on any, and the words it will not know.

    Args:
        module: the one with upstream's three dataclasses of flags.
        words: the command line.
        usage: what argparse says of the usage when a value cannot be read; None: all flags.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser((module.ModelArguments, module.DataArguments, module.TrainingArguments), usage=usage)
    namespace, unknown = parser.parse_known_args(list(words))
    known = [option for action in parser._actions for option in action.option_strings]
    return namespace, [_unknown(word, known) for word in unknown if _FLAG.match(word)]


def _unknown(word: str, known: list[str]) -> str:
    flag = word.split("=")[0]
    hint = nearest(flag, known, spelled=str).rstrip()
    return f"unknown flag {flag}; {hint}" if hint else f"unknown flag {flag}"


def problems_in(flags: Namespace, unknown: Sequence[str] = ()) -> list[str]:
    """Everything that is wrong with a command line, as far as it can be told without a model."""
    problems = _base_problems(flags)
    if active(flags):
        return [*problems, *unknown, *_mode_problems(flags), *_conflicts(flags)]
    return problems + [
        f"--{name} belongs to a tuning mode and none is on; add --tuning_mode {mode}"
        for mode in registry.loadable()
        for name in _given(flags, mode)
    ]


def _base_problems(flags: Namespace) -> list[str]:
    base = flags.model_name_or_path
    if base and files.find(base) is not None:
        return [
            f"--model_name_or_path {base} is an adapter. Give its base there, and --adapter_path {base} "
            "to go on training it"
        ]
    return []


def _given(flags: Namespace, mode: str) -> list[str]:
    return [f"{mode}_{name}" for name in given_settings(flags, mode)]


def _mode_problems(flags: Namespace) -> list[str]:
    named = flags.tuning_mode if flags.tuning_mode not in (None, NONE) else None
    if named is not None and named not in registry.names():
        try:
            registry.get(named)
        except ArgumentsError as error:
            return [f"--tuning_mode: {error}"]
    problems = []
    try:
        mode = mode_from(flags)
    except SteeringError as error:
        given = f"adapter_path {flags.adapter_path}" if flags.adapter_path else "tuning_mode"
        return [f"--{given}: {error}"]
    if flags.adapter_path:
        if named not in (None, mode.name):
            problems.append(
                f"--adapter_path {flags.adapter_path} is a {mode.name} adapter and --tuning_mode says {named}"
            )
        problems += [
            f"--{mode.name}_{name} {value} contradicts the adapter in --adapter_path, which has {getattr(mode, name)}"
            for name, value in given_settings(flags, mode.name).items()
            if value != getattr(mode, name)
        ]
    problems += [f"--{problem}" for problem in mode.problems()]
    others = [name for other in registry.loadable() if other != mode.name for name in _given(flags, other)]
    problems += [f"--{name} belongs to another mode than {mode.name}; remove it" for name in others]
    return problems


def _conflicts(flags: Namespace) -> list[str]:
    """Flags of upstream's that cannot be combined with a tuning mode."""
    reasons = {
        "lora_enable": "LoRA is a tuning mode of its own; remove one of the two",
        "tune_mm_mlp_adapter": "that is stage 1, the projector alone; run it first, without a mode",
        "load_best_model_at_end": "upstream does not evaluate while it trains; evaluate the checkpoints",
        "fsdp": NO_FSDP,
        "mm_tunable_parts": "it unfreezes parts of the model; with a mode, the adapter and the projector are trained",
    }
    return [
        f"--{name} cannot be combined with a tuning mode: {why}"
        for name, why in reasons.items()
        if getattr(flags, name, None)
    ] + _deepspeed_conflicts(flags)


def _deepspeed_conflicts(flags: Namespace) -> list[str]:
    """What cannot be combined with this file of DeepSpeed's; a file that is missing is for transformers to report."""
    path = getattr(flags, "deepspeed", None)
    if not path or not os.path.isfile(path):
        return []
    try:
        config = read_deepspeed(path)
    except ArgumentsError as error:
        return [str(error)]
    problems = []
    stage = config[ZERO]["stage"]
    if stage == 0:
        # Without ZeRO it writes no part of any rank, and `soundness` would take every checkpoint for damaged.
        problems.append(
            f"--deepspeed {path} has no ZeRO stage: DeepSpeed then shards nothing, and nobody can tell whether its "
            "checkpoints are whole. Leave out --deepspeed and start with torchrun, or use stage 2"
        )
    if flags.bits in (4, 8) and stage == 3:
        problems.append(
            f"--bits {flags.bits} with ZeRO-3: transformers cannot cut quantised weights into shards; use ZeRO-2, or "
            "torchrun without --deepspeed"
        )
    if flags.mm_projector_lr is not None and "optimizer" in config:
        problems.append(
            f"--mm_projector_lr with the optimizer of {path}: it has one learning rate for all; remove `optimizer` and "
            "`scheduler` from that file, or the flag"
        )
    if cpu := cpu_flag(flags):
        problems.append(
            f"{cpu} with --deepspeed: transformers then starts without DeepSpeed's ranks; remove {cpu} and "
            "train through `llava_steering_plugin.launch --cpu`"
        )
    return problems


def cpu_flag(flags: Namespace) -> str | None:
    """The flag that keeps a training on the processor, by its new or its old name, if it is given."""
    return next((f"--{name}" for name in ("use_cpu", "no_cuda") if getattr(flags, name, False)), None)


def fail(error: SteeringError, *, every_rank: bool) -> NoReturn:
    """Ends the process as argparse would: the message on stderr, exit status 2, no traceback.

    Args:
        error: what is wrong.
        every_rank: other ranks may know something else; False where all know the same, so that it is said once.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or every_rank:
        sys.stderr.write(f"error{f' (rank {rank})' if every_rank and rank else ''}: {error}\n")
    raise SystemExit(2) from error
