"""Modes to be joined: ours, and two of another package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import DecoderShape, Mode, setting
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.modes.peft.mode import Peft

STEERING = MoReS(rank=2, tokens="all")
ROUTING = MixLoRA(factors=6, rank=2, balance=0.5)
LORA = Peft("lora", '{"r": 4, "lora_alpha": 16}')


class Gain(nn.Module):
    """Scales what its host returns."""

    def __init__(self, size: int):
        super().__init__()
        self.gain_delta = nn.Parameter(torch.zeros(size))

    def forward(self, output: Tensor, inputs: object, this_pass: object) -> Tensor:
        return output + self.gain_delta * output


@dataclass(frozen=True)
class GainMode(Mode):
    """A mode of another package, on layers or on linears of one name."""

    name: ClassVar[str] = "gain"
    where: str = setting("layers", "layers, or the name of linears")

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        if self.where == "layers":
            return {layer.path: Gain(decoder.hidden_size) for layer in decoder.layers}
        return {
            path: Gain(features[1])
            for layer in decoder.layers
            for path, features in layer.linears.items()
            if path.endswith(self.where)
        }

    def begin(self, modules: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> None:
        for path, host in hosts.items():
            modules[path].of_host = type(host).__name__

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        return {"hosts": float(len(modules))}


class CountMode(GainMode):
    """Another one, which reports a figure of the same name."""

    name: ClassVar[str] = "count"
