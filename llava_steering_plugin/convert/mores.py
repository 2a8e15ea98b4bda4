"""MoReS as the authors save it: one pickle a layer and two JSON files in mores/language_model.

intkey_layer.N.comp.block_output...bin holds `rotate_layer` [D, d] with orthonormal columns, `weight` [d, D] and `bias`
[d]: R^T, W and b of the paper. intervention_config.json names layers and ranks, mores_pos_configs.json the positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.fit.base_model import PROJECTOR_PREFIX
from llava_steering_plugin.convert.released import Note, Released
from llava_steering_plugin.convert.torch_files import Weights, json_in, tensors_in
from llava_steering_plugin.errors import AdapterError, BaseMismatch, listing, shortened
from llava_steering_plugin.modes.base import DecoderShape
from llava_steering_plugin.modes.mores import MoReS, Steering

INNER = Path("mores", "language_model")
LAYERS, POSITIONS = "intervention_config.json", "mores_pos_configs.json"
_FILE = re.compile(r"intkey_layer\.(\d+)\.comp\.(\w+)\..*#\d+\.bin")
_EDGES = re.compile(r"f(\d{1,6})\+l(\d{1,6})")
_UNIFORM = re.compile(r"uniform(\d{1,6})")
# How far R may be from orthonormal rows: half precision on disk is not a damaged file.
_ORTHONORMAL = 1e-2
_PARTS = ("rotate_layer", "weight", "bias")
_CONNECTOR = "_connector."
_KNOWN = {
    "intervention_positions",
    "mores_share_weights",
    "intervened_prompt_part",
    "intervene_modality",
    "num_interventions",
    "img_embed_token_len",
}


def found(folder: Path) -> Path | None:
    """Find the inner folder of a MoReS checkpoint from the outer or the inner one; None if there is none."""
    for inner in (folder / INNER, folder):
        if any(inner.glob("intkey_*.bin")) or (inner / LAYERS).is_file() or (inner / POSITIONS).is_file():
            return inner
    return None


@dataclass
class ReleasedMoReS(Released):
    """A MoReS checkpoint: `layers` maps the number of each steered decoder layer to its three tensors."""

    mode: MoReS
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def read(cls, inner: Path) -> ReleasedMoReS:
        """Read the inner folder, and what lies beside it where the whole checkpoint is there.

        Raises:
            AdapterError: a file is missing, damaged or refused, or the adapter is of a kind that has no equal here.
        """
        rank, numbers, dropout = _described_layers(inner / LAYERS)
        tokens, notes = _selection(inner / POSITIONS, len(numbers))
        layers = _layers(inner, numbers)
        if dropout:
            text = f"{dropout}, on the whole hidden state; here dropout is one of the update, and left at 0"
            notes.insert(0, Note("dropout", text))
        mode = MoReS(rank=rank, tokens=tokens, modality="vis", layers=_spec(numbers))
        released = cls(inner, mode, base_name=None, config=None, base={}, projector={}, notes=notes, layers=layers)
        if inner.resolve().parts[-2:] == INNER.parts:
            released._read_model(inner.resolve().parent.parent)
        return released

    def _read_model(self, outer: Path) -> None:
        """Add what the outer folder holds of the model itself, as far as it is there."""
        whole = json_in(outer / "config.json") if (outer / "config.json").is_file() else {}
        if not isinstance(whole, dict):
            raise AdapterError(f"{outer / 'config.json'} holds no table of settings. Copy it again.")
        self.base_name = whole.get("llm_model_name_or_path") or None
        self.base = Weights.of(outer / "language_model") or {}
        path = outer / "connector" / "pytorch_model.bin"
        connector = tensors_in(path) if path.is_file() else {}
        if any(not name.startswith(_CONNECTOR) for name in connector):
            kind = f"{whole.get('connector_type')!r} is no projector of LLaVA's: not carried over"
            self.notes.append(Note("connector/", kind))
        else:
            self.projector = {
                PROJECTOR_PREFIX + name.removeprefix(_CONNECTOR): value for name, value in connector.items()
            }
        if (outer / "vision_tower").is_dir():
            text = "not carried over: the vision tower is loaded from its own source"
            self.notes.append(Note("vision_tower/", text))
        described = outer / "language_model" / "config.json"
        text_config = json_in(described) if described.is_file() else whole.get("text_config")
        if isinstance(text_config, dict):
            seen = _vision_settings(whole) if self.projector else {}
            # With images, the config's type is that of the LLaVA around the language model.
            kind = f"{'llava_' if seen else ''}{text_config.get('model_type')}"
            self.config = {**text_config, **seen, "model_type": kind}

    def fill(self, shape: DecoderShape, modules: Mapping[str, nn.Module]) -> None:
        width, rank = shape.hidden_size, self.mode.rank
        wanted: dict[str, tuple[int, ...]] = {"rotate_layer": (width, rank), "weight": (rank, width), "bias": (rank,)}
        problems = [
            f"layer {number}: {name} is {list(tensors[name].shape)} where the base needs {list(wanted[name])}"
            for number, tensors in self.layers.items()
            for name in _PARTS
            if tuple(tensors[name].shape) != wanted[name]
        ]
        if problems:
            raise BaseMismatch(listing(f"{self.folder} belongs to another base or is damaged", shortened(problems)))
        for number, tensors in self.layers.items():
            rotation = tensors["rotate_layer"].double()
            defect = float((rotation.T @ rotation - torch.eye(rank)).abs().max())
            if defect > _ORTHONORMAL:
                problems.append(f"layer {number}: its columns' products are {defect:.2g} away from 0 and 1")
        if problems:
            raise AdapterError(
                listing(f"rotate_layer in {self.folder} must have orthonormal columns; the files are damaged", problems)
            )
        for number, tensors in self.layers.items():
            steering = modules[shape.layers[number].path].get_submodule("vis")
            assert isinstance(steering, Steering)
            rotation, weight, offset = (tensors[name].float() for name in _PARTS)
            steering.set_paper_weights(rotation.T, weight, offset)
        if len(self.layers) < len(shape.layers):
            text = f"{len(self.layers)} of the base's {len(shape.layers)} are steered; is it the right base?"
            self.notes.append(Note("layers", text))


def _described_layers(path: Path) -> tuple[int, list[int], float]:
    """Read rank, layer numbers and dropout from intervention_config.json."""
    data = json_in(path)
    entries = data.get("representations") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise AdapterError(f"{path} lists no layers under 'representations'. Copy it again.")
    problems, numbers, ranks, dropouts = [], [], set(), set()
    for place, entry in enumerate(entries):
        inside = entry.get("intervention")
        number, rank = entry.get("layer"), entry.get("low_rank_dimension")
        dropout = inside.get("dropout") or 0.0 if isinstance(inside, dict) else None
        if not (type(number) is int and type(rank) is int and rank > 0 and isinstance(dropout, (int, float))):
            problems.append(f"entry {place} lacks a usable layer, low_rank_dimension or intervention")
            continue
        if entry.get("component") != "block_output":
            problems.append(f"layer {number} is steered at {entry.get('component')!r}; only block_output exists here")
        if inside.get("type") != "mores":
            problems.append(f"layer {number} is of type {inside.get('type')!r}; only 'mores' exists here")
        if inside.get("act_fn") not in (None, "linear"):
            problems.append(f"layer {number} applies {inside['act_fn']!r} to W h + b, which MoReS does not")
        if number in numbers:
            problems.append(f"layer {number} is listed twice")
        numbers.append(number)
        ranks.add(rank)
        dropouts.add(dropout)
    if len(ranks) > 1:
        problems.append(f"layers have the ranks {', '.join(map(str, sorted(ranks)))}; an adapter has one rank here")
    if problems:
        raise AdapterError(listing(f"{path} describes no adapter that can be converted", problems))
    return ranks.pop(), sorted(numbers), max(dropouts)


def _layers(inner: Path, numbers: list[int]) -> dict[int, dict[str, Tensor]]:
    """Read the tensors of every layer that is described."""
    files = {int(match[1]): path for path in sorted(inner.glob("intkey_*.bin")) if (match := _FILE.match(path.name))}
    problems = [f"layer {number}: its intkey_ file is missing" for number in numbers if number not in files]
    problems += [f"{files[number].name}: {LAYERS} does not list its layer" for number in files.keys() - set(numbers)]
    if problems:
        raise AdapterError(listing(f"{inner} is not complete", problems))
    layers = {}
    for number in numbers:
        tensors = tensors_in(files[number])
        if set(tensors) != set(_PARTS):
            problems.append(f"{files[number].name} holds {', '.join(tensors) or 'nothing'}, not {', '.join(_PARTS)}")
        problems += [
            f"{files[number].name}: {name} has values that are NaN, infinite or no floats"
            for name, value in tensors.items()
            if not value.is_floating_point() or not bool(torch.isfinite(value).all())
        ]
        layers[number] = tensors
    if problems:
        raise AdapterError(listing(f"{inner} is damaged, or of another kind than MoReS", problems))
    return layers


def _selection(path: Path, layers: int) -> tuple[str, list[Note]]:
    """Read mores_pos_configs.json: the tokens setting that it amounts to, and notes on the rest."""
    data = json_in(path)
    if isinstance(data, list):
        raise AdapterError(
            f"{path} has {len(data)} selections, one for each of two modalities. Steering of text counts its positions "
            "from the question on there and from the prompt's start here, so it cannot be converted."
        )
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds no table of settings. Copy it again.")
    problems = []
    positions, modality = data.get("intervention_positions"), data.get("intervene_modality")
    length = data.get("img_embed_token_len")
    edges, uniform = (pattern.fullmatch(str(positions)) for pattern in (_EDGES, _UNIFORM))
    chosen = []
    if edges:
        chosen = [f"{kind}{int(count)}" for kind, count in zip("fl", edges.groups(), strict=True) if int(count)]
    elif uniform and int(uniform[1]) > 1:
        chosen = [f"uniform{int(uniform[1])}"]
    if not chosen:
        problems.append(f"intervention_positions is {positions!r:.60}; f4+l5 and uniform9 (of 2 or more) are known")
    if modality != "vis":
        problems.append(
            f"intervene_modality is {modality!r:.60}; steering of text counts its positions from the question on there "
            "and from the prompt's start here, so only 'vis' can be converted"
        )
    if data.get("mores_share_weights") is not True:
        problems.append(
            f"mores_share_weights is {data.get('mores_share_weights')!r}: the first half of the layers then steers the "
            "first tokens and the rest the last ones; here all layers steer the same"
        )
    if type(length) is not int or length < 1:
        problems.append(f"img_embed_token_len is {length!r:.60}; a number of tokens is expected")
    counted = data.get("num_interventions")
    if isinstance(counted, dict) and counted.get("llm") not in (None, layers):
        problems.append(f"num_interventions.llm is {counted['llm']} and {LAYERS} lists {layers} layers")
    if problems:
        raise AdapterError(listing(f"{path} describes a selection that cannot be converted", problems))
    return "+".join(chosen), _notes(data, int(uniform[1]) if uniform else 0)


def _notes(data: dict[str, Any], uniform: int) -> list[Note]:
    length = data["img_embed_token_len"]
    notes = [
        Note(
            "intervened_prompt_part",
            f"{data.get('intervened_prompt_part')!r:.60}: there the one image at the question's start is steered, here "
            "every image of the prompt",
        ),
        Note("text-only samples", "there one of their text tokens is steered, here none"),
        Note(
            "img_embed_token_len",
            f"{length}: there an image is always taken to be that long, here its end is where it ends",
        ),
    ]
    if uniform:
        step = (length - 1) // (uniform - 1) if length >= uniform else 1
        last = min(step * (uniform - 1), length - 1)
        if step * (uniform - 1) != length - 1 and length >= uniform:
            text = (
                f"uniform{uniform}: there every {step}th token up to number {last + 1} of {length}, which misses the "
                "end; here evenly from the first to the last, so OTHER TOKENS are steered than in training"
            )
            notes.insert(0, Note("intervention_positions", text))
    notes += [Note(key, f"{data[key]!r:.60}: unknown entry, ignored") for key in sorted(data.keys() - _KNOWN)]
    return notes


def _spec(numbers: list[int]) -> str:
    """Write sorted layer numbers as the layers setting: runs as 0-15, joined by commas."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _vision_settings(whole: dict[str, Any]) -> dict[str, Any]:
    """Return how the checkpoint encodes images, by the keys of LLaVA's config."""
    vision = whole.get("vision_config")
    settings = {
        "mm_vision_tower": whole.get("vision_model_name_or_path"),
        "mm_projector_type": whole.get("connector_type"),
        "mm_hidden_size": vision.get("hidden_size") if isinstance(vision, dict) else None,
        "mm_vision_select_layer": whole.get("vision_feature_layer"),
        "mm_vision_select_feature": whole.get("vision_feature_select_strategy"),
        "image_aspect_ratio": whole.get("image_aspect_ratio"),
        "tokenizer_padding_side": whole.get("tokenizer_padding_side"),
        "tokenizer_model_max_length": whole.get("tokenizer_model_max_length"),
    }
    return {key: value for key, value in settings.items() if value is not None}
