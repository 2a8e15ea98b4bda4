"""`llava-steering plan`: a training's command line, read and checked as the training would, and what it would train."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from llava_steering_plugin.adapters.attachment import attach
from llava_steering_plugin.adapters.base_model import language_model, read_config
from llava_steering_plugin.adapters.compatibility import misfits
from llava_steering_plugin.adapters.counts import LORA_RANKS, ParameterCounts, counted, numel
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.planning.from_flags import Wanted, deepspeed_problems, planned_memory
from llava_steering_plugin.planning.meta_step import TrainingSetup
from llava_steering_plugin.training import flags as arguments
from llava_steering_plugin.upstream.install import install

if TYPE_CHECKING:
    from llava_steering_plugin.planning.report import MemoryPlan


USAGE = "llava-steering plan [--json] [--gpu NAME] [--gpus N] [--sequence N] [the flags of a training]"
BASE_FLAG = "--model_name_or_path"


@dataclass
class _ModelFlags:
    """The flags of upstream's that a plan needs, for where LLaVA cannot be asked for all of them."""

    model_name_or_path: str | None = None
    vision_tower: str | None = None
    mm_projector_type: str = "linear"
    mm_patch_merge_type: str = "flat"


@dataclass
class _DataFlags:
    pass


@dataclass
class _TrainingFlags:
    freeze_mm_mlp_adapter: bool = False


def plan(words: Sequence[str], wanted: Wanted | None = None) -> Plan:
    """The plan of a training, from its flags as they are; of the base only config.json is read.

    Args:
        words: the command line of upstream's training, with or without the program before it. --output_dir may be
            absent.
        wanted: what to know of its memory; None: nothing.

    Raises:
        SystemExit: argparse cannot read a value.
        SteeringError: a registered mode cannot be loaded, or LLaVA lacks what the plugin needs.
    """
    notes: list[str] = []
    module = _flags_of_training(notes)
    few = bool(notes)
    # transformers demands it, and one that is given comes later and wins.
    flags, unknown = arguments.read_command_line(module, ["--output_dir", "", *words], USAGE)
    if few:
        ours = tuple(f"unknown flag --{name}_" for name in registry.names())
        unknown = [problem for problem in unknown if problem.startswith(ours)]

    problems = []
    if not any(word.split("=")[0] == BASE_FLAG for word in words):
        # Upstream's default is some model on the hub; nobody means it.
        problems.append(f"{BASE_FLAG} is missing: the folder, or the name on the hub, of the base model")
        flags.model_name_or_path = None
    if not arguments.active(flags):
        problems.append(f"--tuning_mode is missing; registered: {', '.join(registry.names())}")
    problems += arguments.problems_in(flags, unknown)
    if wanted is not None:
        problems += wanted.problems() + deepspeed_problems(flags)

    mode = _mode(flags)
    described, model = _base(flags.model_name_or_path, problems)
    counts = memory = None
    if model is not None and mode is not None:
        here = misfits(model, mode)
        problems += [f"--{problem}" for problem in here]
        if not here and not mode.problems():
            vision = _vision(flags, described, model.config.hidden_size, notes)
            counts = count(model, mode, 0 if flags.freeze_mm_mlp_adapter else vision.parameters)
            if wanted is not None and not problems and not few:
                base = TrainingSetup(
                    described, flags.model_name_or_path, mode, vision.tower, vision.projector, vision.newline
                )
                memory = planned_memory(base, flags, wanted, model.config.hidden_size, notes)
    settings = {} if mode is None else mode.settings()
    return Plan(None if mode is None else mode.name, settings, counts, memory, tuple(notes), tuple(problems))


def count(model: Any, mode: Mode, projector: int | None) -> ParameterCounts:
    """Counts what training `mode` on `model` would train, attaching it as training does.

    Args:
        model: on the meta device; carries the adapter afterwards.
        mode: valid in itself.
        projector: trained parameters between vision tower and language model; None if unknown.

    Raises:
        ArgumentsError: the settings do not fit the model.
    """
    with torch.device("meta"):
        attachment = attach(model, mode)
    return counted(model, attachment.modules, attachment.shape, projector)


def _flags_of_training(notes: list[str]) -> ModuleType:
    """Upstream's training, with our flags; where it cannot be imported, its few flags that a plan needs, and a note."""
    try:
        install()
        # Its imports greet on standard output, where a plan in JSON is to go.
        with redirect_stdout(sys.stderr):
            return import_module("llava.train.train")
    except (ImportError, RuntimeError) as error:
        notes.append(
            f"llava.train.train cannot be imported here ({error}), so of the flags only {BASE_FLAG} and those of the "
            "tuning modes were checked, and the projector is not counted"
        )
    few = ModuleType("few_flags")
    few.__dict__.update(
        ModelArguments=_ModelFlags, DataArguments=_DataFlags, TrainingArguments=arguments.extended(_TrainingFlags)
    )
    return few


def _mode(flags: Namespace) -> Mode | None:
    try:
        return arguments.mode_from(flags)
    except SteeringError:
        return None  # why is among the problems of the command line


def _base(name: str | None, problems: list[str]) -> tuple[dict[str, Any], Any]:
    """The base's config.json and its language model on the meta device; None and a problem where that cannot be."""
    if name is None:
        return {}, None
    try:
        described = read_config(name)
        return described, language_model(described, name)
    except SteeringError as error:
        problems.append(f"{BASE_FLAG}: {error}")
        return {}, None


@dataclass(frozen=True)
class _Vision:
    """What comes before the language model.

    Attributes:
        parameters: of projector and newline embedding; None if unknown.
        projector: settings for LLaVA's builder; None if unknown.
        newline: parameters of the newline embedding of anyres.
        tower: config.json of the vision tower; None if it cannot be read.
    """

    parameters: int | None = None
    projector: Any = None
    newline: int = 0
    tower: Mapping[str, Any] | None = None


def _vision(flags: Namespace, described: Mapping[str, Any], hidden_size: int, notes: list[str]) -> _Vision:
    """The vision tower and the projector; a note for a trained projector that is unknown."""
    unknown: list[str] = [] if flags.freeze_mm_mlp_adapter else notes
    source: Mapping[str, Any] = vars(flags)
    name = flags.vision_tower
    if "mm_vision_tower" in described:
        # The base brings its projector; upstream keeps that one whatever the flags say.
        source, name = described, described["mm_vision_tower"]
        tower, width = _tower(name, []), described.get("mm_hidden_size")
    elif name:
        tower = _tower(name, unknown)
        width = None if tower is None else _width(tower, name, unknown)
    else:
        unknown.append("the projector is not counted: the base has none, and --vision_tower is not given")
        return _Vision()
    if width is None:
        return _Vision(tower=tower)
    config = SimpleNamespace(
        mm_projector_type=source.get("mm_projector_type", "linear"), mm_hidden_size=width, hidden_size=hidden_size
    )
    try:
        build = import_module("llava.model.multimodal_projector.builder").build_vision_projector
        with torch.device("meta"):
            count = numel(build(config))
    except ImportError:
        return _Vision(tower=tower)  # noted when the flags were read
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        unknown.append(f"the projector is not counted: LLaVA does not build it from these settings ({error})")
        return _Vision(tower=tower)
    newline = hidden_size if "unpad" in (source.get("mm_patch_merge_type") or "") else 0
    return _Vision(count + newline, config, newline, tower)


def _tower(name: Any, notes: list[str]) -> Mapping[str, Any] | None:
    """config.json of the vision tower."""
    try:
        return read_config(str(name))
    except SteeringError as error:
        notes.append(f"the projector is not counted: --vision_tower: {error}")
        return None


def _width(tower: Mapping[str, Any], name: str, notes: list[str]) -> int | None:
    """Features of an image token as the vision tower gives it."""
    # A CLIP of both halves keeps the vision tower's settings apart.
    width = tower.get("vision_config", tower).get("hidden_size")
    if not isinstance(width, int):
        notes.append(f"the projector is not counted: the config.json of --vision_tower {name} names no hidden_size")
        return None
    return width


PARAMETERS = ("mode", "projector", "trainable", "model", "percent", *(f"lora_r{rank}" for rank in LORA_RANKS))


@dataclass(frozen=True)
class Plan:
    """What a command line would train.

    Attributes:
        mode, settings: the tuning mode; None if the command line names none that is known.
        counts: None if the model or the mode cannot be built.
        memory: None if it was not asked for, or something that it needs is not known.
        notes: what the plan does not know or has not checked.
        problems: why this training would not start.
    """

    mode: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: ParameterCounts | None = None
    memory: MemoryPlan | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Every key is always there; what is unknown is None."""
        parameters: dict[str, float | None] = dict.fromkeys(PARAMETERS)
        if self.counts is not None:
            counts = self.counts
            known = (counts.mode, counts.other, counts.trainable, counts.model, counts.percent)
            parameters = dict(zip(PARAMETERS, (*known, *counts.lora.values()), strict=True))
        return {
            "mode": self.mode,
            "settings": dict(self.settings),
            "parameters": parameters,
            "memory": None if self.memory is None else self.memory.as_json(),
            "notes": list(self.notes),
            "problems": list(self.problems),
        }
