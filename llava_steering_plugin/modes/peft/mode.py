"""The mode `peft`: LoRA (arXiv 2106.09685), DoRA (2402.09353), IA3 (2205.05638), OFT (2306.07280), LoHa (2108.06098)
and LoKr (2309.14859), by the PEFT that is installed.

PEFT puts its layers on a skeleton of the decoder, of linears that take no memory. So its own code decides which linears
a config means and how they begin; the layers then work on the real ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llava_steering_plugin.errors import nearest
from llava_steering_plugin.modes.base import UNBUILDABLE, DecoderShape, LayerShape, Mode, setting
from llava_steering_plugin.modes.peft.layers import NAME, TunedLinear, is_dora, start_dora
from llava_steering_plugin.modes.peft.settings import (
    METHODS,
    as_peft,
    completed,
    config_problems,
    method_problems,
    read_config,
    version,
)

# What PEFT raises, too, where settings describe nothing that can be built.
_UNBUILDABLE = (*UNBUILDABLE, AttributeError, re.error)


@dataclass(frozen=True)
class Peft(Mode):
    """Puts a layer of PEFT's on every linear of the decoder that the config means; on all, where it names none."""

    name: ClassVar[str] = "peft"

    method: str = setting("lora", f"PEFT's method: {', '.join(METHODS)}")
    config: str | None = setting(
        None,
        "PEFT's settings of the method, as JSON or as a file that holds it; PEFT's defaults if not given",
        file=True,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", completed(self.method, self.config))

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        found = method_problems(self.method) or config_problems(self.method, self.config)
        if found:
            return found
        try:
            if decoder is not None and (missed := self._missed(decoder)):
                return missed
            with torch.device("meta"):
                self._tuner(_ANY if decoder is None else decoder, everywhere=decoder is None)
        except _UNBUILDABLE as error:
            return [f"peft_config: PEFT {version()} cannot build it: {error}"]
        return []

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        tuner = self._tuner(decoder)
        prefix = _prefix(decoder)
        return {
            path.removeprefix(prefix): TunedLinear(tuner.model.get_submodule(path))
            for path in tuner.targeted_module_names
        }

    def begin(self, modules: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            host = hosts[path]
            if isinstance(module, TunedLinear) and is_dora(module.layer) and isinstance(host, nn.Linear):
                start_dora(module, host)

    @property
    def shards(self) -> bool:
        return self.method == "lora" and not self._is_dora()

    @property
    def full_name(self) -> str:
        return f"{self.name} ({'dora' if self._is_dora() else self.method})"

    def _is_dora(self) -> bool:
        try:
            return self.method == "lora" and bool(read_config(self.config).get("use_dora"))
        except ValueError:
            return False  # `problems` says what is wrong with it

    def config_for_peft(self, decoder: DecoderShape) -> dict[str, Any]:
        """Return what adapter_config.json says. Linears are in full there: `q_proj` means those of the tower too."""
        with torch.device("meta"):
            tuner = self._tuner(decoder)
        config = tuner.peft_config[NAME]
        changed: dict[str, Any] = {"target_modules": sorted(tuner.targeted_module_names), "inference_mode": True}
        for name in ("layers_to_transform", "layers_pattern"):
            if hasattr(config, name):
                changed[name] = None
        if hasattr(config, "feedforward_modules"):
            changed["feedforward_modules"] = sorted(
                path for path in tuner.targeted_module_names if tuner.model.get_submodule(path).is_feedforward
            )
        return {**config.to_dict(), **changed}

    def _tuner(self, decoder: DecoderShape, everywhere: bool = False) -> Any:
        """Return PEFT's tuner of a skeleton of the decoder, with its layers in place.

        Args:
            everywhere: on every linear, whatever the config names.

        Raises:
            ValueError, TypeError and others of PEFT's: it cannot be built.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        config = as_peft(self.method, self.config)
        if everywhere:
            config.layers_to_transform = None
        if everywhere or config.target_modules is None:
            # By their last names, so that `layers_to_transform` still counts.
            config.target_modules = {path.rpartition(".")[2] for layer in decoder.layers for path in layer.linears}
        if hasattr(config, "feedforward_modules") and config.feedforward_modules is None:
            config.feedforward_modules = []
        return PEFT_TYPE_TO_TUNER_MAPPING[self.method.upper()](_skeleton(decoder), config, NAME)

    def _missed(self, decoder: DecoderShape) -> list[str]:
        """Return which of the names and layers in the config the decoder does not have."""
        config = as_peft(self.method, self.config)
        paths = [_prefix(decoder) + path for layer in decoder.layers for path in layer.linears]
        known = sorted({path.rpartition(".")[2] for path in paths})
        problems = []
        for setting_name in ("target_modules", "feedforward_modules"):
            wanted = getattr(config, setting_name, None)
            if wanted is None or (not wanted and setting_name != "target_modules"):
                continue
            if isinstance(wanted, str):
                missed = [] if any(_matches(wanted, path) for path in paths) else [wanted]
            else:
                missed = sorted(n for n in wanted if not any(p == n or p.endswith(f".{n}") for p in paths))
            if missed or not wanted:
                named = ", ".join(f"{name:.100}" for name in missed[:5])
                wrong = f"no linear of the decoder is called {named}" if missed else "it is empty"
                hint = nearest(missed[0], known) if missed else ""
                problems.append(
                    f"peft_config: {setting_name}: {wrong}; {hint}the decoder has {', '.join(known) or 'none'}"
                    f"{f' (in full {paths[0]}, and so on)' if paths else ''}. Vision tower, projector and "
                    "language-model head are not tuned"
                )
        layers = getattr(config, "layers_to_transform", None)
        beyond = [
            each for each in ([layers] if isinstance(layers, int) else layers or []) if each >= len(decoder.layers)
        ]
        if beyond:
            problems.append(
                f"peft_config: layers_to_transform names {beyond[0]}, and the decoder has {len(decoder.layers)} "
                "layers, counted from 0"
            )
        return problems


# For settings that are checked without a model.
_ANY = DecoderShape(8, (LayerShape("layers.0", {"layers.0.mlp.any_proj": (8, 8)}),))


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return True  # building says what is wrong with it


def _prefix(decoder: DecoderShape) -> str:
    return f"{decoder.stack}." if decoder.stack else ""


def _skeleton(decoder: DecoderShape) -> nn.Module:
    """Return modules in the places of the decoder's linears in the model, with weights that take no memory."""
    root = nn.Module()
    for layer in decoder.layers:
        for path, (in_features, out_features) in layer.linears.items():
            parent = root
            *above, leaf = (_prefix(decoder) + path).split(".")
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, _Weightless(in_features, out_features))
    return root


class _Weightless(nn.Linear):
    """A linear whose weight has the right shape, dtype and device, and one value in memory."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        weight = torch.zeros((), dtype=torch.float32).expand(out_features, in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)
