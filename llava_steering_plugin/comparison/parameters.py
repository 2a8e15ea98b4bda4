"""Count what each method would train, from config.json and the flags alone: no model is loaded."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

from llava_steering_plugin.adapters.counts import ParameterCounts
from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.cells import Cell
from llava_steering_plugin.comparison.schema import Comparison
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.planning.plan import plan


@dataclass(frozen=True)
class Counted:
    """Numbers of trained parameters; None where they are not known.

    Attributes:
        own: the mode's, LoRA's, or the whole model's.
        projector: of the projector, 0 if it is frozen.
    """

    own: int | None
    projector: int | None


def count_parameters(cell: Cell, comparison: Comparison) -> Counted:
    """Count what a cell trains, as `llava-steering plan` does.

    LoRA is on every linear of the decoder, as upstream has it.
    """
    flags = cell.method.flags
    if cell.method.frozen:
        return Counted(0, 0)
    words = commands.training_flags(cell, comparison, comparison.output)
    if cell.method.has_mode:
        counts = _counts(words)
        return Counted(None, None) if counts is None else Counted(counts.mode, counts.other)
    # Counted beside a mode: a plan of a training without one has no numbers.
    without = {commands.LORA, "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_weight_path"}
    counts = _counts([*_left(words, without), "--tuning_mode", "mores", "--mores_rank", "1"])
    if counts is None:
        return Counted(None, None)
    if _is_on(flags.get(commands.LORA)):
        rank, parameters = next(iter(counts.lora.items()))
        return Counted(parameters * int(flags.get("lora_r", 64)) // rank, counts.other)
    own = 0 if _is_on(flags.get("tune_mm_mlp_adapter")) or _is_on(flags.get("freeze_backbone")) else counts.model
    return Counted(own, counts.other)


def _counts(words: list[str]) -> ParameterCounts | None:
    try:
        with redirect_stdout(sys.stderr):
            return plan(words).counts
    except (SteeringError, SystemExit):
        return None


def _left(words: list[str], without: set[str]) -> list[str]:
    """Return a command line without some flags, each with one value."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for name, value in pairs if name.removeprefix("--") not in without for word in (name, value)]


def _is_on(value: object) -> bool:
    return str(value).lower() in ("true", "1", "yes")
