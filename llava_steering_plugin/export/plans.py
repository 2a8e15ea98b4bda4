"""Says for each layout which tensors are written of which, and writes all other files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_steering_plugin.components.picture_layouts import GRID
from llava_steering_plugin.convert.torch_files import Weights
from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.export import configs, tensor_names
from llava_steering_plugin.export.configs import TOWER_FOLDER
from llava_steering_plugin.export.layouts import Source
from llava_steering_plugin.export.single_linear import check_identity, identity, renamed
from llava_steering_plugin.export.streaming import Piece, check_shapes, piece
from llava_steering_plugin.export.vocabulary import SPECIAL_TOKENS, TOKENIZER_CONFIG, Vocabulary, more_rows
from llava_steering_plugin.foreign_files import read_json

# What a LLaVA was before it became transformers': its settings, for the way back.
RECORD = "llava_export.json"
CONFIG, GENERATION, PROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Plan:
    """Says what is written.

    Attributes:
        pieces: the model's tensors, by their folder below the new one ("" for itself).
        files: the contents of JSON files, by their path below the new folder.
        notes: what the user should know.
    """

    pieces: Mapping[str, list[Piece]]
    files: Mapping[str, Mapping[str, Any]]
    notes: list[str]

    @property
    def size(self) -> int:
        """Of all tensors, in bytes."""
        return sum(each.size for pieces in self.pieces.values() for each in pieces)


def weights_of(folder: Path) -> Weights:
    """Return the tensors of a model's folder.

    Raises:
        SteeringError: there are none, or some files are missing or damaged.
    """
    found = Weights.of(folder)
    if found is None:
        raise ArgumentsError(f"{folder} holds no weights: neither safetensors nor pytorch_model.bin.")
    return found


def plan_for_transformers(source: Source, vocabulary: Vocabulary, template: str, conversation: str) -> Plan:
    """Return what of a LLaVA becomes which file of transformers' Llava, or LlavaNext for pictures in tiles.

    Args:
        source: the LLaVA.
        vocabulary: with a token for images.
        template: the chat template.
        conversation: name of LLaVA's, for the way back.

    Raises:
        SteeringError: its files do not belong together.
    """
    from transformers import CLIPImageProcessor

    assert source.tower is not None
    weights = weights_of(source.folder)
    embedding = "model.embed_tokens.weight"
    if embedding not in weights:
        raise ArgumentsError(f"the weights in {source.folder} have no {embedding}: they are no language model's.")
    before = weights[embedding].shape[0]
    rows = vocabulary.rows(before)
    config = configs.for_transformers(source.config, source.tower, rows, vocabulary.image, vocabulary.pad)
    learned = min(before, vocabulary.image)
    pieces, strange = [], []
    own_tower = bool(source.config.get("unfreeze_mm_vision_tower")) and any(
        name.startswith(tensor_names.TOWER_IN_LLAVA) for name in weights
    )
    for name in weights:
        if tensor_names.is_computed(name):
            continue
        if name.startswith(tensor_names.TOWER_IN_LLAVA):
            if own_tower:
                target = tensor_names.to_transformers(name.removeprefix(tensor_names.TOWER_IN_LLAVA))
                pieces.append(piece(str(target), weights, name))
        elif (new := tensor_names.to_transformers(name, tiles=source.tiles)) is None:
            strange.append(f"{name} has no place in transformers' Llava")
        elif new in (tensor_names.EMBEDDING, tensor_names.HEAD):
            if new == tensor_names.HEAD and config["tie_word_embeddings"]:
                continue
            shape = (rows, *weights[name].shape[1:])
            pieces.append(piece(new, weights, name, more_rows(rows, learned), shape))
        else:
            pieces.append(piece(new, weights, name))
    if strange:
        raise ArgumentsError(listing(f"{source.name} cannot be exported", shortened(strange)))
    if not own_tower:
        seeing = weights_of(source.tower)
        pieces += [
            piece(str(tensor_names.to_transformers(name)), seeing, name)
            for name in seeing
            if name.startswith(tensor_names.TOWER) and not tensor_names.is_computed(name)
        ]
    if config["projector_hidden_act"] == "linear":
        pieces += identity(config["text_config"]["hidden_size"], weights)
    check_shapes(pieces, configs.tensors_of_transformers(config), source.name)
    padded = source.config.get("image_aspect_ratio") == "pad"
    described = CLIPImageProcessor.from_pretrained(source.tower).to_dict() | {"processor_class": processor(source)}
    if source.tiles:
        # do_pad is there of the number of tiles, in a batch.
        described |= {"do_pad": True, "image_processor_type": "LlavaNextImageProcessor", GRID: config[GRID]}
    if padded:
        described |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    files = {
        CONFIG: config,
        GENERATION: settings(source.folder, GENERATION)
        | {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        PROCESSOR: described,
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,  # CLIP's class token
            "patch_size": config["vision_config"]["patch_size"],
            "processor_class": processor(source),
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        },
        "chat_template.json": {"chat_template": template},
        RECORD: {
            "config": source.config,
            "conversation": {"name": conversation},
            **{name: settings(source.folder, f"{name}.json") for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)},
        },
    }
    notes = [
        "processor_config.json is for transformers from 4.46 on; older ones stop at it: delete it there",
    ]
    if padded:
        notes.append(
            "LLaVA pads pictures to a square. Processors that know do_pad (LlavaImageProcessor) pad as well; older "
            "ones, such as 4.37's, crop: pad pictures that are not square yourself there"
        )
    return Plan({"": pieces}, files, notes)


def plan_for_llava(source: Source, target: Path, tokens: int, record: Mapping[str, Any]) -> Plan:
    """Return what of transformers' Llava or LlavaNext becomes which file of a LLaVA.

    Args:
        target: where the new folder will be.
        tokens: of LLaVA's tokenizer, without one for images.
        record: what RECORD holds, if it is there.

    Raises:
        SteeringError: its files do not belong together.
    """
    from transformers import CLIPImageProcessor, LlavaConfig

    weights = weights_of(source.folder)
    one_linear = source.config.get("projector_hidden_act", "gelu") == "linear"
    recorded = dict(record.get("config", {}))
    wanted = recorded.get("vocab_size")
    pieces: dict[str, list[Piece]] = {"": [], TOWER_FOLDER: []}
    strange = []
    for name in weights:
        if tensor_names.is_computed(name):
            continue
        new = tensor_names.to_llava(name, one_linear=one_linear)
        if new is None:
            if one_linear and ".linear_2." in name:
                check_identity(name, weights[name])
            else:
                strange.append(f"{name} has no place in LLaVA")
        elif new.startswith(tensor_names.TOWER):
            pieces[TOWER_FOLDER].append(piece(new, weights, name))
        elif new in ("model.embed_tokens.weight", "lm_head.weight"):
            rows, *width = weights[name].shape
            if rows < tokens:
                raise ArgumentsError(f"{source.name} has {rows} rows in {name} for {tokens} tokens of its tokenizer.")
            kept = wanted if isinstance(wanted, int) and tokens <= wanted <= rows else tokens
            pieces[""].append(piece(new, weights, name, _first(kept), (kept, *width)))
        else:
            pieces[""].append(piece(new, weights, name))
    if strange:
        raise ArgumentsError(listing(f"{source.name} cannot be exported", shortened(strange)))
    kept = next((each.shape[0] for each in pieces[""] if each.target == "model.embed_tokens.weight"), tokens)
    place = target / TOWER_FOLDER
    config = configs.for_llava(source.config, place, kept, recorded, one_linear=one_linear)
    if one_linear and config["mm_projector_type"] == "mlp1x_gelu":
        pieces[""] = [renamed(each) for each in pieces[""]]
    if config.get("tie_word_embeddings"):
        pieces[""] = [each for each in pieces[""] if each.target != "lm_head.weight"]
    vision = LlavaConfig.from_dict(dict(source.config)).vision_config
    of_llava, of_tower = configs.tensors_of_llava(config, vision)
    check_shapes(pieces[""], of_llava, source.name)
    check_shapes(pieces[TOWER_FOLDER], of_tower, f"the vision tower of {source.name}")
    described = CLIPImageProcessor.from_pretrained(source.folder).to_dict()
    pads = bool(described.pop("do_pad", False))
    for key in ("processor_class", "image_processor_type", GRID):
        described.pop(key, None)
    notes = [f"the config names the vision tower by its path, {place}: edit mm_vision_tower if you move the folder"]
    if "llava" not in target.name.lower():
        notes.append(f"LLaVA's loader goes by names: give the folder one with 'llava' in it, unlike {target.name!r}")
    if not recorded and not pads and not source.tiles:
        notes.append("image_aspect_ratio is set to 'pad', as LLaVA-1.5 was trained; this model's processor crops")
    files = {
        CONFIG: config,
        GENERATION: settings(source.folder, GENERATION),
        f"{TOWER_FOLDER}/{CONFIG}": configs.plain(vision, "CLIPVisionModel"),
        f"{TOWER_FOLDER}/{PROCESSOR}": described | {"image_processor_type": "CLIPImageProcessor"},
    }
    return Plan(pieces, files, notes)


def processor(source: Source) -> str:
    """Return the name of transformers' processor for a model."""
    return "LlavaNextProcessor" if source.tiles else "LlavaProcessor"


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what RECORD holds; nothing if it is not there.

    Raises:
        ArgumentsError: it is damaged.
    """
    record = settings(folder, RECORD)
    if not all(isinstance(value, dict) for value in record.values()):
        raise ArgumentsError(f"{folder / RECORD} is damaged. Delete it, or copy it again.")
    return record


def write_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write JSON files below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def settings(folder: Path, file: str) -> dict[str, Any]:
    """Return what a JSON file of a model holds; nothing if it is not there.

    Raises:
        ArgumentsError: it is damaged.
    """
    try:
        found = read_json(folder / file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"{folder / file} cannot be read: {error}. Copy it again.") from error
    return found if isinstance(found, dict) else {}


def _first(rows: int) -> Callable[[Tensor], Tensor]:
    def change(matrix: Tensor) -> Tensor:
        return matrix[:rows]

    return change
