"""The config.json of a model in the other layout, and the tensors that a model of that config has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from llava_steering_plugin.components.picture_layouts import GRID
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.export.layouts import ONE_LINEAR, TILES, TWO_LINEARS, cuts_into_tiles, transposed
from llava_steering_plugin.export.tensor_names import NEWLINE, NEWLINE_IN_LLAVA, TOWER

_FEATURES = {"patch": "default", "cls_patch": "full"}
# transformers' default, [height, width].
_USUAL_GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# Below a LLaVA that is made: its config names the place.
TOWER_FOLDER = "vision_tower"


def for_transformers(config: Mapping[str, Any], tower: Path, rows: int, image_token: int, pad: int) -> dict[str, Any]:
    """Return the config of a LlavaForConditionalGeneration, or of a LlavaNext's for pictures in tiles.

    Args:
        config: LLaVA's.
        tower: folder of its CLIP.
        rows: of the embedding.
        image_token: id of "<image>".
        pad: id of the token that fills up batches.

    Raises:
        ArgumentsError: one of the configs describes no model.
    """
    from transformers import CLIPVisionConfig, LlamaConfig

    try:
        text = LlamaConfig(**_of_llama(config) | {"vocab_size": rows})
        vision = CLIPVisionConfig.from_pretrained(tower)
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentsError(f"the config.json of the model, or of its tower {tower}, is wrong: {error}") from error
    feature = str(config.get("mm_vision_select_feature", "patch"))
    if feature not in _FEATURES:
        raise ArgumentsError(f"the config has mm_vision_select_feature {feature!r}; LLaVA has {', '.join(_FEATURES)}.")
    patches = (vision.image_size // vision.patch_size) ** 2
    own: dict[str, Any] = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    if cuts_into_tiles(config):
        own = {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            GRID: transposed(config[GRID]),
        }
    return {
        **own,
        "text_config": plain(text, "LlamaForCausalLM"),
        "vision_config": plain(vision, "CLIPVisionModel"),
        "image_token_index": image_token,
        "image_seq_length": patches + (feature == "cls_patch"),
        "ignore_index": -100,
        "projector_hidden_act": "linear" if config.get("mm_projector_type", "linear") in ONE_LINEAR else "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _FEATURES[feature],
        "pad_token_id": pad,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        # The outer default is true; the head is tied to the embedding only if the language model says so.
        "tie_word_embeddings": text.tie_word_embeddings,
        "vocab_size": rows,
        "torch_dtype": config.get("torch_dtype", "float16"),
    }


def for_llava(
    config: Mapping[str, Any], tower: Path, rows: int, recorded: Mapping[str, Any], *, one_linear: bool
) -> dict[str, Any]:
    """Return the config of a LlavaLlamaForCausalLM.

    Args:
        config: transformers' outer config.
        tower: where the vision tower will lie.
        rows: of the embedding.
        recorded: the config of the LLaVA that `config` was exported from; empty if it was not.
        one_linear: the projector is a linear.
    """
    from transformers import LlavaConfig

    whole = LlavaConfig.from_dict(dict(config))
    features = {value: key for key, value in _FEATURES.items()}
    text = plain(whole.text_config, "LlavaLlamaForCausalLM")
    defaults = {
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": config.get("torch_dtype", "float16"),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    fixed = {
        "model_type": "llava_llama",
        "mm_hidden_size": whole.vision_config.hidden_size,
        "mm_projector_type": recorded.get("mm_projector_type", "linear") if one_linear else TWO_LINEARS,
        "mm_vision_select_feature": features[whole.vision_feature_select_strategy],
        "mm_vision_select_layer": whole.vision_feature_layer,
        "mm_vision_tower": str(tower),
        "vocab_size": rows,
    }
    if cuts_into_tiles(config):
        fixed |= {**TILES, GRID: transposed(config.get(GRID) or _USUAL_GRID)}
        fixed = {key: value for key, value in fixed.items() if key != GRID or GRID not in recorded}
    return (dict(recorded) or text | defaults) | fixed


def tensors_of_transformers(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a Llava or LlavaNext of transformers, by their older names.

    The names are put together from the parts, which have the same in all versions of transformers.
    """
    from transformers import LlavaConfig

    whole = LlavaConfig.from_dict(dict(config))
    text, vision = _llama(whole.text_config), _clip(whole.vision_config)
    width, seen = whole.text_config.hidden_size, whole.vision_config.hidden_size
    projector = {
        "multi_modal_projector.linear_1.weight": (width, seen),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    projector |= {NEWLINE: (width,)} if cuts_into_tiles(config) else {}
    of_text = {f"language_model.{name}": shape for name, shape in text.items()}
    return of_text | {f"vision_tower.{name}": shape for name, shape in vision.items()} | projector


def tensors_of_llava(config: Mapping[str, Any], vision: Any) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Return the shapes of a LLaVA's tensors and of its tower's.

    Args:
        config: LLaVA's.
        vision: config of the tower.
    """
    from transformers import LlamaConfig

    text = _llama(LlamaConfig(**_of_llama(config)))
    width, seen = config["hidden_size"], config["mm_hidden_size"]
    kind, beginning = config["mm_projector_type"], "model.mm_projector."
    first = beginning if kind == "linear" else f"{beginning}0."
    projector: dict[str, tuple[int, ...]] = {f"{first}weight": (width, seen), f"{first}bias": (width,)}
    if kind == TWO_LINEARS:
        projector |= {f"{beginning}2.weight": (width, width), f"{beginning}2.bias": (width,)}
    projector |= {NEWLINE_IN_LLAVA: (width,)} if cuts_into_tiles(config) else {}
    return text | projector, _clip(vision)


def _of_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a LLaVA's config that make its language model."""
    from transformers import LlamaConfig

    known = inspect.signature(LlamaConfig.__init__).parameters
    return {key: value for key, value in config.items() if key in known}


def plain(config: Any, architecture: str) -> dict[str, Any]:
    """Return the settings that make a model of this config: no defaults of `generate`, as `to_dict` has them."""
    made_of = inspect.signature(type(config).__init__).parameters
    described = {key: value for key, value in config.to_dict().items() if key in made_of}
    return described | {"model_type": config.model_type, "architectures": [architecture]}


def _llama(config: Any) -> dict[str, tuple[int, ...]]:
    from transformers import LlamaForCausalLM

    shapes = _shapes(LlamaForCausalLM, config)
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _clip(config: Any) -> dict[str, tuple[int, ...]]:
    from transformers import CLIPVisionModel

    shapes = _shapes(CLIPVisionModel, config)
    return {TOWER + name.removeprefix(TOWER): shape for name, shape in shapes.items()}


def _shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers.modeling_utils import no_init_weights

    # Drawing values that the meta device does not keep takes seconds.
    with torch.device("meta"), no_init_weights():
        model: nn.Module = model_class(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}
