"""MixLoRA as the authors save it: the state of the whole wrapped model, and its arguments as a pickled namespace.

pytorch_model.bin names every tensor with the prefix of PEFT's wrapper, base_model.model.<LLaVA's name>, and below each
linear `lora_A.default.0` ... `lora_B.default.0` ... `cmoa_selector.*` and `cmoa_loarB_extra_selector.*`, as
modes/mixlora.py lists them. cmoa_args.bin holds the settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.fit.base_model import PROJECTOR_PREFIX
from llava_steering_plugin.convert.released import Note, Released
from llava_steering_plugin.convert.torch_files import Weights, json_in, namespace_in
from llava_steering_plugin.errors import AdapterError, BaseMismatch, listing, shortened
from llava_steering_plugin.modes.base import DecoderShape
from llava_steering_plugin.modes.mixlora import RELEASED, MixLoRA, RoutedLinear

ARGUMENTS = "cmoa_args.bin"
_PREFIX = "base_model.model."
# The authors' model is a Llama, whose decoder stack has this name in it.
_STACK = "model."
_OURS = re.compile(r"(?P<linear>.+)\.(?P<part>(?:lora_[AB]\.default\.\d+)|(?:cmoa_\w+\.\w+\.weight))")
# Buffers that older versions of transformers saved and every version computes by itself.
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")
_CONDITIONS = {"input": False, "input_lora_a_param": True}
_ROUTER_A = "cmoa_selector.loraA_selector.weight"
_ROUTER_B = {
    False: "cmoa_selector.loraB_selector.weight",
    True: "cmoa_loarB_extra_selector.loraB_selector.weight",
}
_ROUTER_AB = "cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight"
# Arguments that must have one value, and what another one would mean.
_FIXED: dict[str, tuple[Any, str]] = {
    "mix_mm_projector": (False, "the projector itself has factors chosen by a task embedding"),
    "used_scored_weight": (False, "factors are weighted by their scores"),
    "independent_rank": (True, "B takes the indices that were chosen for A"),
    "mix_loraA": (True, "A is one plain LoRA matrix"),
    "mix_start_layer": (0, "the layers before it have plain LoRA, which this mode does not"),
    "lora_bias": ("none", "biases of the base were trained"),
}
# The settings they become.
_COUNTS = {"n_experts": "factors", "n_selected": "rank"}
_NUMBERS = {"lora_alpha": "alpha", "lora_dropout": "dropout", "ifs_weight": "ifs_weight"}


class Renamed(Mapping[str, Tensor]):
    """Tensors under other names, still read only when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]


@dataclass
class ReleasedMixLoRA(Released):
    """A MixLoRA checkpoint: `parts` maps each linear's name in the model to its tensors, by their names below it."""

    mode: MixLoRA
    parts: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> ReleasedMixLoRA:
        """Read a folder with cmoa_args.bin in it.

        Raises:
            AdapterError: a file is missing, damaged or refused, or the adapter is of a kind that has no equal here.
        """
        weights = Weights.of(folder)
        if weights is None:
            raise AdapterError(
                f"{folder} has {ARGUMENTS} but no weights: neither pytorch_model.bin nor model.safetensors, whole or "
                "in shards with an index. Copy the checkpoint again, with all its files."
            )
        names = {name.removeprefix(_PREFIX): name for name in weights}
        ours: dict[str, dict[str, str]] = {}
        for name, stored in names.items():
            if match := _OURS.fullmatch(name):
                ours.setdefault(match["linear"], {})[match["part"]] = stored
        if not ours:
            raise AdapterError(
                f"{weights.folder} holds no factors of MixLoRA (lora_A.default.0 and so on). Is it the base instead?"
            )
        mode, notes = _mode(folder / ARGUMENTS)
        largest = max(sum(part.startswith("lora_A.") for part in parts) for parts in ours.values())
        if mode.factors > largest:
            raise AdapterError(
                f"{folder} contradicts itself: n_experts in {ARGUMENTS} is {mode.factors}, and no linear has more than "
                f"{largest} factors. Copy both files from the same checkpoint."
            )
        rest = {name: stored for name, stored in names.items() if not _OURS.fullmatch(name)}
        base, projector = _sorted_out(rest, notes)
        config, base_name = _config(folder / "config.json")
        return cls(
            folder,
            mode,
            base_name,
            config,
            Renamed(weights, base),
            Renamed(weights, projector),
            _added_tokens(folder / "added_tokens.json"),
            notes,
            {linear: Renamed(weights, parts) for linear, parts in ours.items()},
        )

    def fill(self, shape: DecoderShape, modules: Mapping[str, nn.Module]) -> None:
        hosts = {_STACK + path: module for path, module in modules.items()}
        problems = [f"{linear}: the checkpoint has no factors for it" for linear in hosts if linear not in self.parts]
        problems += [f"{linear}: the base's decoder has no such linear" for linear in self.parts if linear not in hosts]
        if problems:
            raise BaseMismatch(listing(f"{self.folder} and the base do not have the same layers", shortened(problems)))
        for linear, module in hosts.items():
            problems += _misfits(linear, self.parts[linear], _expected(module))
        if problems:
            raise AdapterError(listing(f"{self.folder} does not fit its own settings or the base", shortened(problems)))
        for linear, module in hosts.items():
            _copy(self.parts[linear], module)


def _mode(path: Path) -> tuple[MixLoRA, list[Note]]:
    """Read and check the settings in cmoa_args.bin."""
    given = namespace_in(path)
    problems: list[str] = []
    settings: dict[str, Any] = {}
    condition = str(given.get("cond_type"))
    if condition not in _CONDITIONS:
        problems.append(f"cond_type is {condition!r:.60}; only {' and '.join(_CONDITIONS)} can be converted")
    for name, (expected, meaning) in _FIXED.items():
        found = given.get(name, expected)
        if type(found) is not type(expected) or found != expected:
            problems.append(f"{name} is {found!r:.60} ({meaning}); only {expected!r} can be converted")
    given.setdefault("ifs_weight", 1)  # the first versions of the authors' code had no such argument
    for name, setting in (_COUNTS | _NUMBERS).items():
        value: Any = given.get(name)
        whole = type(value) is int and abs(value) < 1e9
        if whole or (type(value) is float and name in _NUMBERS):
            settings[setting] = value if name in _COUNTS else float(value)
        else:
            problems.append(f"{name} is {value!r:.60}; a number is expected")
    if not problems:
        mode = MixLoRA(conditional=_CONDITIONS[condition], variant=RELEASED, **settings)
        problems = mode.problems()
    if problems:
        raise AdapterError(listing(f"{path} describes no adapter that can be converted", problems))
    known = {"cond_type", "attribute_dim", *_FIXED, *_COUNTS, *_NUMBERS}
    notes = [Note(name, f"{given[name]!r:.60}: unknown entry, ignored") for name in sorted(given.keys() - known)]
    if "attribute_dim" in given:
        notes.append(Note("attribute_dim", f"{given['attribute_dim']!r}: used by neither kind of selection, left out"))
    return mode, notes


def _sorted_out(names: Mapping[str, str], notes: list[Note]) -> tuple[dict[str, str], dict[str, str]]:
    """Sort the names of what is not MixLoRA's: the base's tensors, and the projector's."""
    base, projector, seen = {}, {}, 0
    for name, stored in names.items():
        if name.startswith(PROJECTOR_PREFIX) or name == "model.image_newline":
            projector[name] = stored
        elif ".vision_tower." in name:
            seen += 1
        elif not _COMPUTED.fullmatch(name):
            base[name] = stored
    if seen:
        notes.append(Note("vision_tower", f"{seen} tensors left out: the tower is loaded from its own source"))
    return base, projector


def _config(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return the checkpoint's config as a LLaVA without MixLoRA would have it, and the base that it names."""
    if not path.is_file():
        return None, None
    config = json_in(path)
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no table of settings. Copy it again.")
    base = config.get("_name_or_path") or None
    sees = "mm_vision_tower" in config
    ours = ("quantization_config", "use_cmoa", "cond_type", "mix_mm_projector", "_name_or_path")
    config = {key: value for key, value in config.items() if key not in ours}
    config["model_type"] = "llava_llama" if sees else "llama"
    config["architectures"] = ["LlavaLlamaForCausalLM" if sees else "LlamaForCausalLM"]
    return config, base


def _added_tokens(path: Path) -> dict[str, int]:
    added = json_in(path) if path.is_file() else {}
    if not isinstance(added, dict) or not all(type(number) is int for number in added.values()):
        raise AdapterError(f"{path} is no table of tokens and their ids. Copy it again.")
    return dict(sorted(added.items(), key=lambda item: item[1]))


def _expected(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a linear's tensors must have in the checkpoint."""
    assert isinstance(module, RoutedLinear)
    mode, (factors, width), out = module.mode, module.routed_a.shape, module.routed_b.shape[1]
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(factors):
        shapes[f"lora_A.default.{number}"] = (1, width)
        shapes[f"lora_B.default.{number}"] = (1, out)
    shapes[_ROUTER_A] = shapes[_ROUTER_B[mode.conditional]] = (factors, width)
    if mode.conditional:
        shapes[_ROUTER_AB] = (factors, mode.rank * width)
    return shapes


def _misfits(linear: str, parts: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = []
    for names, what in (
        (expected.keys() - parts.keys(), "missing"),
        (parts.keys() - expected.keys(), "without a place"),
    ):
        if names:
            found.append(f"{linear}: {', '.join(shortened(sorted(names), 3))}: {what}")
    for name in sorted(expected.keys() & parts.keys()):
        value = parts[name]
        if tuple(value.shape) != expected[name]:
            found.append(f"{linear}.{name} is {list(value.shape)} where {list(expected[name])} is needed")
        elif not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            found.append(f"{linear}.{name} has values that are NaN, infinite or no floats")
    return found


@torch.no_grad()
def _copy(parts: Mapping[str, Tensor], module: nn.Module) -> None:
    assert isinstance(module, RoutedLinear)
    factors, width = module.routed_a.shape
    module.routed_a.copy_(torch.cat([parts[f"lora_A.default.{number}"] for number in range(factors)]))
    module.routed_b.copy_(torch.cat([parts[f"lora_B.default.{number}"] for number in range(factors)]))
    module.router_a.copy_(parts[_ROUTER_A])
    module.router_b.copy_(parts[_ROUTER_B[module.mode.conditional]])
    if module.mode.conditional:
        # A row of the authors' matrix holds the r factors' weights one after the other.
        module.router_ab.copy_(parts[_ROUTER_AB].view(factors, module.mode.rank, width).transpose(0, 1))
