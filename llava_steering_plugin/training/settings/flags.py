"""Declare the flags of the tuning modes, and read a training's command line into one `TrainingRequest`.

Each setting of a registered mode is a flag `--<mode>_<setting>`.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llava_steering_plugin.adapters.fit.unmerged import unmerged_lora
from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.adapters.stored.locate import find, locate
from llava_steering_plugin.components.registry import LANGUAGE_MODELS
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing, nearest
from llava_steering_plugin.foreign_files import read_text
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.joint import joint, kinds_of, part_names, parts_of
from llava_steering_plugin.training.settings import diagnostics_flags, validation_flags
from llava_steering_plugin.training.settings.conflicts import conflicts, zero_stage

NONE = "none"
JOINED = "two of them joined by a plus, such as mores+mixlora"
LANGUAGE_MODEL = "language_model"
CANNOT_START = "this training cannot start"
# Also with the dashes that text processors make of two hyphens; a value may be a negative number.
_FLAG = re.compile("[-–—]+[A-Za-z]")


@dataclass(frozen=True)
class TrainingRequest:
    """A training as its command line asks for it.

    Attributes:
        mode: the tuning mode with its settings, with --adapter_path those of the adapter; None if no mode is on, or
            if its settings cannot be read.
        flags: all flags of LLaVA's training, with those of the tuning modes.
        problems: what is wrong with the flags, as far as they tell without the base and the machine.
        adapter: the folder that --adapter_path has led to.
    """

    mode: Mode | None
    flags: Namespace
    problems: tuple[str, ...] = ()
    adapter: AdapterFolder | None = None


def read_request(
    classes: Sequence[type], words: Sequence[str], *, usage: str | None = None, complete: bool = True
) -> TrainingRequest:
    """Read a command line as LLaVA's train() will, without acting on any flag.

    Args:
        classes: the dataclasses that declare the flags.
        words: the command line.
        usage: the usage line that argparse prints when it cannot read a value; None: all flags.
        complete: `classes` declare every flag of LLaVA; otherwise only the modes' flags are checked for typing errors.

    Raises:
        SystemExit: argparse cannot read a value.
        SteeringError: a registered mode cannot be loaded.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(tuple(classes), usage=usage)
    flags, rest = parser.parse_known_args(list(words))
    known = [option for action in parser._actions for option in action.option_strings]
    unknown = [word.split("=")[0] for word in rest if _FLAG.match(word)]
    if not complete:
        unknown = [flag for flag in unknown if flag.startswith(tuple(f"--{name}_" for name in registry.names()))]
    return _checked(flags, [f"unknown flag {flag}{_hint(flag, known)}" for flag in unknown])


def _hint(flag: str, known: Sequence[str]) -> str:
    hint = nearest(flag, known, spelled=str).rstrip()
    return f"; {hint}" if hint else ""


def extended(original: type) -> type:
    """Return LLaVA's TrainingArguments with our flags, under its own name, so that pickles of it open without us.

    Raises:
        SteeringError: one of our flags exists in this LLaVA already, or a registered mode cannot be loaded.
    """
    modes = registry.loadable()
    fields: list[tuple[str, Any, Any]] = [
        ("tuning_mode", str, _flag(NONE, f"parameter-efficient tuning mode: {NONE}, {', '.join(modes)}, or {JOINED}")),
        ("adapter_path", str | None, _flag(None, "continue training from this adapter (folder or hub id)")),
        (LANGUAGE_MODEL, str | None, _flag(None, _language_models())),
        (validation_flags.DATA, str | None, _flag(None, validation_flags.HELP)),
    ]
    fields.append(("skip_bad_samples", bool, _flag(False, "train another sample in the place of one that is bad")))
    fields.append((diagnostics_flags.STEPS, int, _flag(0, diagnostics_flags.STEPS_HELP)))
    fields.append((diagnostics_flags.SAMPLES, int | None, _flag(None, diagnostics_flags.SAMPLES_HELP)))
    for mode in modes.values():
        fields += _flags_of(mode)
    taken = {field.name for field in dataclasses.fields(original)}
    if clashes := sorted(taken & {name for name, _, _ in fields}):
        raise SteeringError(
            f"the flags --{', --'.join(clashes)} exist in this LLaVA already; rename the mode's settings."
        )
    new = dataclasses.make_dataclass(
        original.__name__, fields, bases=(original,), namespace={"__post_init__": _checking(original)}
    )
    new.__module__, new.__qualname__, new.__doc__ = original.__module__, original.__qualname__, original.__doc__
    return new


def _language_models() -> str:
    names = ", ".join(LANGUAGE_MODELS.names())
    return f"component that makes a LLaVA of the base: {names} (default: by model_type in the base's config.json)"


def _checking(original: Any) -> Callable[[Any], None]:
    """Return a `__post_init__` that makes one message of what transformers raises for values that it refuses."""

    def check(arguments: Any) -> None:
        try:
            original.__post_init__(arguments)
        except (ValueError, ImportError, OSError) as error:
            if not mode_is_on(arguments):
                raise
            raise ArgumentsError(listing(CANNOT_START, [str(error).strip()])) from error

    return check


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


def mode_is_on(arguments: Any) -> bool:
    """Return whether flags, or the training arguments made of them, turn a tuning mode on."""
    return getattr(arguments, "tuning_mode", NONE) not in (None, NONE) or bool(getattr(arguments, "adapter_path", None))


def mode_from(arguments: Any, adapter: AdapterFolder | None = None) -> Mode:
    """Return the mode that flags describe; with --adapter_path, the one that the adapter was trained with.

    Args:
        adapter: the folder of --adapter_path, where it has been found already.

    Raises:
        AdapterError: the adapter is missing or damaged.
        ArgumentsError: unknown mode, or one that is installed in a version without the adapter's settings.
    """
    if arguments.adapter_path:
        config = locate(adapter or arguments.adapter_path).config
        return registry.configured(config.mode, config.settings)
    kinds = kinds_of(registry.get(arguments.tuning_mode))
    return joint(*(kind(**_settings(arguments, kind)) for kind in kinds))


def _settings(arguments: Any, mode: type[Mode]) -> dict[str, Any]:
    """Return the settings of a mode, which is no joint one, that were given as flags."""
    values = {}
    for field in dataclasses.fields(mode):
        value = getattr(arguments, f"{mode.name}_{field.name}", None)
        if value is not None:
            values[field.name] = _text_of(value) if field.metadata.get("file") else value
    return values


def _text_of(value: str) -> str:
    """Return the text of the file of that name; the value itself where there is none, for the mode to judge."""
    try:
        return value if value.lstrip().startswith("{") else read_text(Path(value).expanduser())
    except (OSError, ValueError):
        return value


def _checked(flags: Namespace, unknown: list[str]) -> TrainingRequest:
    problems = _base_problems(flags)
    given = {name: _settings(flags, mode) for name, mode in registry.loadable().items()}
    if not mode_is_on(flags):
        problems += [
            f"--{mode}_{name} belongs to a tuning mode and none is on; add --tuning_mode {mode}"
            for mode, settings in given.items()
            for name in settings
        ]
        if getattr(flags, "skip_bad_samples", False):
            problems.append("--skip_bad_samples belongs to the tuning modes and none is on; add one with --tuning_mode")
        if path := getattr(flags, validation_flags.DATA, None):
            problems.append(f"--{validation_flags.DATA} {path} works with a tuning mode only; add --tuning_mode")
        problems += diagnostics_flags.problems_without_mode(flags)
        return TrainingRequest(None, flags, tuple(problems))
    mode: Mode | None = None
    adapter: AdapterFolder | None = None
    try:
        adapter = locate(flags.adapter_path) if flags.adapter_path else None
        mode = mode_from(flags, adapter)
        of_mode = _mode_problems(flags, mode, given)
    except SteeringError as error:
        of_mode = [f"--adapter_path {flags.adapter_path}: {error}" if flags.adapter_path else f"--tuning_mode: {error}"]
    of_mode = _unknown_mode(flags) or of_mode
    return TrainingRequest(mode, flags, (*problems, *unknown, *of_mode, *conflicts(flags)), adapter)


def _base_problems(flags: Namespace) -> list[str]:
    base = flags.model_name_or_path
    if base and find(base) is not None:
        return [
            f"--model_name_or_path {base} is an adapter. Give its base there, and --adapter_path {base} "
            "to go on training it"
        ]
    if base and mode_is_on(flags) and (advice := unmerged_lora(base)):
        return [f"--model_name_or_path {advice}"]
    return []


def _unknown_mode(flags: Namespace) -> list[str]:
    named = flags.tuning_mode
    if named in (None, NONE) or named in registry.names():  # a registered one is loaded only where it is wanted
        return []
    try:
        registry.get(named)
    except ArgumentsError as error:
        return [f"--tuning_mode: {error}"]
    return []


def _mode_problems(flags: Namespace, mode: Mode, given: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the mode's settings, and with flags that contradict it.

    Args:
        given: the settings that were given as flags, by mode.
    """
    problems = []
    parts = {part.name: part for part in parts_of(mode)}
    if flags.adapter_path:
        if flags.tuning_mode not in (None, NONE) and not _names(flags.tuning_mode, mode):
            problems.append(
                f"--adapter_path {flags.adapter_path} is a {mode.name} adapter and --tuning_mode says "
                f"{flags.tuning_mode}"
            )
        problems += [
            f"--{name}_{each} {value} contradicts the adapter in --adapter_path, which has {getattr(part, each)}"
            for name, part in parts.items()
            for each, value in given.get(name, {}).items()
            if getattr(dataclasses.replace(part, **given[name]), each) != getattr(part, each)
        ]
    problems += [f"--{problem}" for problem in mode.problems()]
    if not mode.shards and zero_stage(flags) == 3:
        problems.append(
            f"--deepspeed {flags.deepspeed} is ZeRO-3, which cannot train {mode.full_name}: it uses parameters "
            "outside of the modules that hold them, where ZeRO-3 has cut them. Use ZeRO-2, or torchrun alone"
        )
    if mode.projector_alone and getattr(flags, "freeze_mm_mlp_adapter", False):
        problems.append(
            f"--freeze_mm_mlp_adapter True leaves nothing to train: --tuning_mode {mode.name} trains the projector "
            "alone"
        )
    problems += [
        f"--{other}_{name} belongs to another mode than {mode.name}; remove it"
        for other, settings in given.items()
        if other not in parts
        for name in settings
    ]
    return problems


def _names(written: str, mode: Mode) -> bool:
    """Say whether a mode is written so; the parts of a joint one may be in any order."""
    return written == mode.name or sorted(part_names(written)) == sorted(part_names(mode.name))
