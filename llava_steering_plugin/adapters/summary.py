"""What is trained and what it is: parameter counts, the table at the start of a training, the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.modes.base import DecoderShape

# What the table compares with: a small LoRA, and LLaVA-1.5's own.
LORA_RANKS = (8, 128)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        mode: trainable ones of the tuning mode.
        other: trainable ones of the model itself: the projector, unless it is frozen; None if unknown.
        model: all parameters of the model without the adapter.
        lora: for comparison, what LoRA on every decoder linear would train, by rank.
    """

    mode: int
    other: int | None
    model: int
    lora: dict[int, int]

    @property
    def trainable(self) -> int | None:
        return None if self.other is None else self.mode + self.other

    @property
    def percent(self) -> float | None:
        """Trainable ones in percent of the model with its adapter."""
        return None if self.trainable is None else 100 * self.trainable / (self.model + self.mode)


def numel(module: nn.Module) -> int:
    """Parameters of `module` as the mathematics counts them: unpacked if quantised, whole if cut, shared ones once."""
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
    """What LoRA of that rank trains on every linear of the decoder."""
    return sum(rank * (features[0] + features[1]) for layer in shape.layers for features in layer.linears.values())


def parameter_table(name: str, counts: ParameterCounts) -> Table:
    """The table that rank 0 prints before the first step."""
    table = Table(title=f"Trainable parameters ({name})", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("of the model", justify="right")
    rows = [(name, counts.mode), ("projector", counts.other), ("total", counts.trainable)]
    rows += [(f"for comparison: LoRA r={rank}", count) for rank, count in counts.lora.items()]
    for label, count in rows:
        share = () if count is None else (f"{count:,}", f"{100 * count / counts.model:.4f} %")
        table.add_row(label, *(share or ("unknown", "")))
    return table


def model_card(config: AdapterConfig, parameters: int, extras: list[str]) -> str:
    """README.md of an adapter: what it is and how to load it."""
    settings = "\n".join(f"| {key} | `{value}` |" for key, value in config.settings.items())
    trained = "\n".join(f"| {key} | `{value}` |" for key, value in config.trained_on.items())
    carried = (
        f"\nIt also carries {len(extras)} tensors of the model itself that the base lacks or that were trained: "
        f"{', '.join(f'`{name}`' for name in extras)}.\n"
        if extras
        else ""
    )
    return f"""---
library_name: llava-steering-plugin
base_model: {config.base.name_or_path}
tags:
- llava
- {config.mode}
---

# A {config.mode} adapter for {config.base.name_or_path}

{parameters:,} parameters of tuning mode `{config.mode}`, trained with
llava-steering-plugin on a base of {config.base.num_layers} layers of width {config.base.hidden_size}.
{carried}
## Loading

With LLaVA's own commands, where `pip install llava-steering-plugin` and `llava-steering patch` were run:

    python -m llava.serve.cli --model-path THIS_FOLDER --image-file image.jpg

The base is found by the name above; if it has moved, add `--model-base`. In Python:

    from llava_steering_plugin import load_adapter
    load_adapter(model, "THIS_FOLDER", tokenizer=tokenizer)

## Settings

| setting | value |
| --- | --- |
{settings}
{trained}
| conversation template | `{config.conversation}` |
"""


def counted(
    model: nn.Module, modules: Mapping[str, nn.Module], shape: DecoderShape, other: int | None
) -> ParameterCounts:
    """Counts a model that carries `modules`; `other` is what is trained of the model itself."""
    ours = [parameter for module in modules.values() for parameter in module.parameters()]
    trained = sum(parameter.numel() for parameter in ours if parameter.requires_grad)
    lora = {rank: lora_parameters(shape, rank) for rank in LORA_RANKS}
    return ParameterCounts(trained, other, numel(model) - sum(parameter.numel() for parameter in ours), lora)
