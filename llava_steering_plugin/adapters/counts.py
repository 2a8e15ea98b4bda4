"""Counts parameters, and prints the table that a training starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table
from torch import nn

from llava_steering_plugin.modes.base import DecoderShape
from llava_steering_plugin.modes.joint import part_of

# What the table compares with: a small LoRA, and LLaVA-1.5's own.
LORA_RANKS = (8, 128)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        mode: trainable ones of the tuning mode.
        parts: of these, those of each part of a joint mode, by its name; none of another mode.
        other: trainable ones of the model itself: the projector, unless it is frozen; None if unknown.
        model: all parameters of the model without the adapter.
        lora: for comparison, what LoRA on every decoder linear would train, by rank.
    """

    mode: int
    other: int | None
    model: int
    lora: dict[int, int]
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def trainable(self) -> int | None:
        return None if self.other is None else self.mode + self.other

    def __str__(self) -> str:
        """Return one line, as PEFT's `print_trainable_parameters` has it."""
        if self.trainable is None:
            return (
                f"{self.mode:,} trainable parameters in the adapter, an unknown number in the model of {self.model:,}"
            )
        return (
            f"{self.mode:,} trainable parameters in the adapter and {self.other:,} in the model; "
            f"{self.model + self.mode:,} in all, {self.percent:.4f} % of them trainable"
        )

    @property
    def percent(self) -> float | None:
        """Trainable ones in percent of the model with its adapter; None if unknown."""
        return None if self.trainable is None else 100 * self.trainable / (self.model + self.mode)


def numel(module: nn.Module) -> int:
    """Count the parameters of `module`: unpacked if quantised, whole if cut by ZeRO-3, shared ones once."""
    total = 0
    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(part, nn.Linear) and name == "weight":
                total += part.in_features * part.out_features
            else:
                total += int(getattr(parameter, "ds_numel", parameter.numel()))
    return total


def lora_parameters(shape: DecoderShape, rank: int) -> int:
    """Count what LoRA of that rank trains on every linear of the decoder."""
    return sum(rank * (features[0] + features[1]) for layer in shape.layers for features in layer.linears.values())


def parameter_table(name: str, counts: ParameterCounts) -> Table:
    """Make the table that rank 0 prints before the first step; `name` is the full one of the mode."""
    table = Table(title=f"Trainable parameters ({name})", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("of the model", justify="right")
    rows: list[tuple[str, int | None]] = [(name, counts.mode)] if counts.mode else []
    rows += [(f"of it {part}", count) for part, count in counts.parts.items()]
    rows += [("projector", counts.other), ("total", counts.trainable)]
    rows += [(f"for comparison: LoRA r={rank}", count) for rank, count in counts.lora.items()]
    for label, count in rows:
        share = () if count is None else (f"{count:,}", f"{100 * count / counts.model:.4f} %")
        table.add_row(label, *(share or ("unknown", "")))
    return table


def counted(
    model: nn.Module, modules: Mapping[str, nn.Module], shape: DecoderShape, other: int | None
) -> ParameterCounts:
    """Count a model that carries `modules`; `other` is the number of parameters trained in the model itself."""
    ours = [parameter for module in modules.values() for parameter in module.parameters()]
    lora = {rank: lora_parameters(shape, rank) for rank in LORA_RANKS}
    rest = numel(model) - sum(parameter.numel() for parameter in ours)
    parts: dict[str, int] = {}
    for module in modules.values():
        if (part := part_of(module)) is not None:
            parts[part] = parts.get(part, 0) + _trained(module)
    return ParameterCounts(sum(map(_trained, modules.values())), other, rest, lora, parts)


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
