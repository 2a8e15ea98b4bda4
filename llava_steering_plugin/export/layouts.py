"""Recognises LLaVA's layout and transformers' by what a config.json holds, and says what the other one cannot hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.fit.unmerged import unmerged_lora
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.components.picture_layouts import ANYRES, ASPECT, GRID, MERGE, is_anyres
from llava_steering_plugin.components.registry import TOWERS, split
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.hub import absent, hub_folder
from llava_steering_plugin.inference.base_files import is_llava, read_base_files

# LLaVA's first checkpoints say "llava" and no more, as transformers' own do; these have a text_config.
LLAMA_TYPES = ("llava_llama", "llava")
# Of LLaVA's own projectors; what transformers' Llava holds is two linears with an activation between.
ONE_LINEAR = ("linear", "mlp1x_gelu")
TWO_LINEARS = "mlp2x_gelu"
# LLaVA-1.6: pictures in tiles, which transformers' LlavaNext has. Nothing else of LLaVA's does the same there.
TILES: Mapping[str, str] = {ASPECT: ANYRES, MERGE: "spatial_unpad"}
OWN_TYPES = ("llava", "llava_next")  # transformers'
CLIP_TYPES = ("clip", "clip_vision_model")
WANTED = ("*.json", "*.safetensors", "*.bin", "tokenizer.model")


class Layout(Enum):
    """The two ways in which the same model lies on disk."""

    LLAVA = "LLaVA"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Source:
    """A model that can be exported.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        config: its config.json.
        tower: folder of the vision tower; None where the model's own files hold it.
    """

    name: str
    folder: Path
    layout: Layout
    config: dict[str, Any]
    tower: Path | None

    @property
    def tiles(self) -> bool:
        """Return whether it cuts pictures into tiles."""
        return cuts_into_tiles(self.config)


def cuts_into_tiles(config: Mapping[str, Any]) -> bool:
    """Return whether a model of this config, in either layout, is a LLaVA-1.6."""
    if config["model_type"] in OWN_TYPES and "text_config" in config:
        return bool(config["model_type"] == "llava_next")
    return all(config.get(key) == value for key, value in TILES.items())


def transposed(grid: Any) -> list[list[int]]:
    """Return the sizes of pictures in tiles as the other layout has them: [width, height] in LLaVA's.

    Raises:
        ValueError, SyntaxError, TypeError: `grid` is no list of sizes, and no text of one.
    """
    sizes = ast.literal_eval(grid) if isinstance(grid, str) else grid
    return [[int(second), int(first)] for first, second in sizes]


def recognise(name: str) -> Source:
    """Find the model of that name, a folder or a model on the hub, which is downloaded.

    Raises:
        SteeringError: it is no such model, or holds what the other layout cannot; the message names all of it.
    """
    if (adapter := find(name)) is not None:
        base = adapter.read().config.base
        raise ArgumentsError(f"{name} is an adapter. Export its base, {base.name_or_path}; the adapter stays as it is.")
    if (reason := unmerged_lora(name)) is not None:
        raise ArgumentsError(reason)
    config = read_base_files(name)
    if config["model_type"] in OWN_TYPES and isinstance(config.get("text_config"), dict):
        layout, problems = Layout.TRANSFORMERS, transformers_problems(config)
    elif is_llava(config):
        layout, problems = Layout.LLAVA, llava_problems(config)
    else:
        raise ArgumentsError(
            f"{name} is no LLaVA: its config.json has model type {config['model_type']!r}, and neither LLaVA's "
            "mm_vision_tower nor the text_config and vision_config of transformers' Llava or LlavaNext."
        )
    tower = None
    if layout is Layout.LLAVA and isinstance(config["mm_vision_tower"], str) and not _component(config):
        try:
            tower = _folder(config["mm_vision_tower"])
            if (kind := read_base_files(str(tower))["model_type"]) not in CLIP_TYPES:
                problems.append(f"its vision tower is of type {kind!r}; transformers' Llava here is exported with CLIP")
        except SteeringError as error:
            problems.append(f"its vision tower: {error}")
    if problems:
        raise ArgumentsError(listing(f"{name} cannot be exported", problems))
    return Source(name, _folder(name), layout, config, tower)


def _component(config: Mapping[str, Any]) -> bool:
    """Say whether the vision tower is a component, built by name."""
    tower = config.get("mm_vision_tower")
    return isinstance(tower, str) and not Path(tower).exists() and split(tower)[0] in TOWERS.names()


def llava_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what of a LLaVA transformers' Llava and LlavaNext cannot hold."""
    problems = []
    if config["model_type"] not in LLAMA_TYPES:
        problems.append(
            f"its language model is of type {config['model_type']!r}; only Llama (llava_llama) is exported, because "
            "transformers' LlavaProcessor takes Llama's tokenizer"
        )
    if "quantization_config" in config:
        problems.append("it is quantised: export the model before its quantisation")
    if _component(config):
        problems.append(f"its vision tower is {config['mm_vision_tower']}; transformers' Llava here takes CLIP")
    projector = config.get("mm_projector_type", "linear")
    if projector not in (*ONE_LINEAR, TWO_LINEARS):
        problems.append(
            f"its projector is {projector!r}; transformers' Llava has one or two linears ({', '.join(ONE_LINEAR)}, "
            f"{TWO_LINEARS})"
        )
    aspect, merge = config.get(ASPECT), config.get(MERGE, "flat")
    if cuts_into_tiles(config):
        problems += _tile_problems(config)
    elif is_anyres(aspect) or merge != "flat":
        problems.append(
            f"it lays images out with {ASPECT} {aspect!r} and {MERGE} {merge!r}; of that, "
            f"transformers' LlavaNext has {' with '.join(TILES.values())} alone"
        )
    return problems


def _tile_problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    try:
        if not transposed(config.get(GRID)):
            raise ValueError("it is empty")
    except (ValueError, SyntaxError, TypeError):
        found.append(f"its {GRID} is {config.get(GRID)!r}; it needs a list of sizes [width, height]")
    if config.get("mm_vision_select_feature", "patch") != "patch":
        found.append("it cuts images into tiles with mm_vision_select_feature 'cls_patch', which LLaVA itself refuses")
    return found


def transformers_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what of transformers' Llava or LlavaNext LLaVA's own code cannot hold."""
    problems = []
    # transformers leaves out what equals a default: Llama and CLIP.
    text, vision = config["text_config"], config.get("vision_config") or {}
    if (kind := text.get("model_type", "llama")) != "llama":
        problems.append(f"its language model is of type {kind!r}; only Llama is exported")
    if (kind := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
        problems.append(f"its vision tower is of type {kind!r}; LLaVA's own is CLIP")
    if config.get("projector_hidden_act", "gelu") not in ("gelu", "linear"):
        problems.append(f"its projector computes {config['projector_hidden_act']!r} between its linears, LLaVA's gelu")
    if not isinstance(config.get("vision_feature_layer", -2), int):
        problems.append("it takes several layers of its vision tower, and LLaVA one")
    if config.get("multimodal_projector_bias", True) is not True:
        problems.append("its projector has no biases, and LLaVA's has")
    if config["model_type"] == "llava_next" and config.get("vision_feature_select_strategy", "default") != "default":
        problems.append("it cuts images into tiles and keeps the class token of each, which LLaVA cannot")
    if "quantization_config" in config:
        problems.append("it is quantised: export the model before its quantisation")
    return problems


def _folder(name: str) -> Path:
    """Return a folder, or where a model of the hub has been downloaded to.

    Raises:
        ArgumentsError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ArgumentsError(absent(name))
    try:
        return hub_folder(name, list(WANTED))
    except Exception as error:  # no such model, no network: each has errors of its own
        raise ArgumentsError(absent(name)) from error
