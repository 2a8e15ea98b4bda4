"""Plan a training from its command line: check it as the training would, and count what it would train."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from llava_steering_plugin.adapters.attachment import attach
from llava_steering_plugin.adapters.counts import LORA_RANKS, ParameterCounts, counted
from llava_steering_plugin.adapters.fit.base_model import language_model, read_config
from llava_steering_plugin.adapters.fit.compatibility import misfits
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.lazy_imports import without_glue_metrics
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.planning.from_flags import Wanted, deepspeed_problems, memory_report
from llava_steering_plugin.planning.meta_step import TrainingSetup
from llava_steering_plugin.planning.vision import find_vision, next_layout
from llava_steering_plugin.training.settings.flags import extended, mode_is_on, read_request
from llava_steering_plugin.upstream.install import install
from llava_steering_plugin.upstream.model.component_checks import component_problems

if TYPE_CHECKING:
    from llava_steering_plugin.planning.report import MemoryReport

USAGE = "llava-steering plan [--json] [--gpu NAME] [--gpus N] [--sequence N] [the flags of a training]"
BASE_FLAG = "--model_name_or_path"
PARAMETERS = ("mode", "projector", "trainable", "model", "percent", *(f"lora_r{rank}" for rank in LORA_RANKS))
PARTS = "parts"  # by name, how many each part of a joint mode has; of another mode it is the one part


@dataclass(frozen=True)
class Plan:
    """Holds what a command line would train.

    Attributes:
        mode, settings: the tuning mode; None if the command line names none that is known.
        full_name: what tables call the mode.
        counts: None if the model or the mode cannot be built.
        memory: None if it was not asked for, or something that it needs is not known.
        notes: what the plan does not know or has not checked, and what the mode remarks on its settings.
        problems: why this training would not start.
    """

    mode: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: ParameterCounts | None = None
    memory: MemoryReport | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    full_name: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values. Every key is always there; what is unknown is None."""
        parameters: dict[str, Any] = dict.fromkeys((*PARAMETERS, PARTS))
        if self.counts is not None:
            counts = self.counts
            known = (counts.mode, counts.other, counts.trainable, counts.model, counts.percent)
            parameters = dict(zip(PARAMETERS, (*known, *counts.lora.values()), strict=True))
            parameters[PARTS] = dict(counts.parts) or {self.mode: counts.mode}
        return {
            "mode": self.mode,
            "settings": dict(self.settings),
            "parameters": parameters,
            "memory": None if self.memory is None else self.memory.as_json(),
            "notes": list(self.notes),
            "problems": list(self.problems),
        }


@dataclass
class _ModelFlags:
    """The flags of LLaVA that a plan needs, for where LLaVA cannot be imported and asked for all of them."""

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


@dataclass(frozen=True)
class _Base:
    """The base as its config.json describes it, with its language model on the meta device; or why there is none."""

    described: Mapping[str, Any] = field(default_factory=dict)
    model: Any = None
    problems: tuple[str, ...] = ()


def plan(words: Sequence[str], wanted: Wanted | None = None) -> Plan:
    """Plan a training from its flags as they are; of the base only config.json is read.

    Args:
        words: the command line of LLaVA's training, with or without the program before it. --output_dir may be
            absent.
        wanted: what to know of its memory; None: nothing.

    Raises:
        SystemExit: argparse cannot read a value.
        SteeringError: a registered mode cannot be loaded, or LLaVA lacks what the plugin needs.
    """
    classes, not_importable = _flag_classes()
    notes = [] if not_importable is None else [not_importable]
    # transformers requires --output_dir, and LLaVA's default base is a model on the hub, which nobody means. What is in
    # `words` comes later and wins.
    defaults = ["--output_dir", "", BASE_FLAG, ""]
    request = read_request(classes, [*defaults, *words], usage=USAGE, complete=not_importable is None)
    flags, mode = request.flags, request.mode

    problems = []
    name = flags.model_name_or_path
    if not name:
        problems.append(f"{BASE_FLAG} is missing: the folder, or the name on the hub, of the base model")
    if not mode_is_on(flags):
        problems.append(f"--tuning_mode is missing; registered: {', '.join(registry.names())}")
    problems += request.problems
    if wanted is not None:
        problems += wanted.problems() + deepspeed_problems(flags)
    base = _read_base(name)
    problems += base.problems
    if not_importable is None:
        problems += component_problems(flags, base.described)

    counts = memory = None
    if base.model is not None and mode is not None:
        too_large = [f"--{problem}" for problem in misfits(base.model, mode)]
        problems += too_large
        if not too_large and not mode.problems():
            width = base.model.config.hidden_size
            vision = find_vision(flags, base.described, width)
            if not flags.freeze_mm_mlp_adapter:
                notes += vision.notes
            if vision.tokens is not None:
                notes += mode.remarks(vision.tokens.count)
            counts = count(base.model, mode, 0 if flags.freeze_mm_mlp_adapter else vision.parameters)
            if wanted is not None and not problems and not_importable is None:
                features = None if vision.shape is None else vision.shape.tokens
                parts = (vision.tower, vision.projector, vision.newline, features)
                layout, unknown = next_layout(flags, vision)
                notes += unknown
                memory = memory_report(
                    TrainingSetup(base.described, name, mode, *parts), flags, wanted, width, vision.tokens, layout
                )
                notes += memory.notes
    settings = {} if mode is None else mode.settings()
    named = (None, None) if mode is None else (mode.name, mode.full_name)
    return Plan(named[0], settings, counts, memory, tuple(notes), tuple(problems), named[1])


def count(model: Any, mode: Mode, projector: int | None) -> ParameterCounts:
    """Count what training `mode` on `model` would train, attaching it as training does.

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


def _flag_classes() -> tuple[tuple[type, ...], str | None]:
    """Return the classes that declare the flags of LLaVA's training and ours.

    Where LLaVA cannot be imported, they declare the few flags that a plan needs, and the second value says so.
    """
    try:
        install()
        # Imports of LLaVA print to standard output, where a plan in JSON is to go.
        with redirect_stdout(sys.stderr), without_glue_metrics():
            module = import_module("llava.train.train")
    except (ImportError, RuntimeError) as error:
        return (_ModelFlags, _DataFlags, extended(_TrainingFlags)), (
            f"llava.train.train cannot be imported here ({error}), so of the flags only {BASE_FLAG} and those of the "
            "tuning modes were checked, and the projector is not counted"
        )
    from llava_steering_plugin.upstream.train.training import flag_classes

    return flag_classes(module), None


def _read_base(name: str) -> _Base:
    if not name:
        return _Base()
    try:
        described = read_config(name)
        return _Base(described, language_model(described, name))
    except SteeringError as error:
        return _Base(problems=(f"{BASE_FLAG}: {error}",))
