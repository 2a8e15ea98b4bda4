"""The families of models: where each keeps its decoder and its projector, and how it says which tokens are visual.

A family is chosen by what a model has, never by the name of its class:

- spliced: LLaVA, its versions and forks. They put image features between text in a method of their own, the splice.
- placeholder: transformers' own classes. The prompt holds a token for every image feature, which takes its place.
- told: all other decoder-only language models. `token_map()` says which positions are visual.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.hooks.parameter_names import (
    DECODER_PATH,
    HEAD_PATH,
    NEWLINE,
    NEWLINE_PATH,
    PARTS,
    PROJECTOR,
    PROJECTOR_PATH,
    TOWER_PATH,
    Place,
    of_one_linear,
)
from llava_steering_plugin.hooks.token_map import TokenMap, of_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLICE = "prepare_inputs_labels_for_multimodal"
# Entries of a config that hold the token which image features take the place of, and the one for frames of a video.
# Both names of each are in use.
VIDEO_TOKENS = ("video_token_id", "video_token_index")
PLACEHOLDERS = (("image_token_id", "image_token_index"), VIDEO_TOKENS)
# The argument of `forward` that holds a video.
FRAMES = "pixel_values_videos"
# What the vision tower is called, and in transformers before version 5 (and in all of LLaVA) the model inside it.
TOWER, INSIDE = "vision_tower", "vision_model"
# The method by which older versions of transformers put the features in place while `forward` runs.
MERGE = "_merge_input_ids_with_image_features"
# What transformers says where features and placeholders are not as many: the kind, and how many placeholders. The other
# number that it says is in 5.24's Llava that of all values of the features.
MISMATCH = re.compile(r"(Image|Video) features and \w+ tokens do not match\D+(\d+)")


class Family:
    """Knows of a model what its weights do not say. This one is told which tokens are visual.

    Attributes:
        name: of the family, for messages.
        splices: True for a LLaVA, whose splice takes images.
        projector_name: what the module between vision tower and decoder is called.
    """

    name = "told"
    splices = False
    projector_name = PROJECTOR

    def __init__(self, model: PreTrainedModel):
        self._model = model

    @property
    def text_config(self) -> Any:
        """The config of the language model, which may be a part of the model's."""
        return text_config(self._model.config)

    def decoder(self) -> nn.Module:
        """Return the decoder stack."""
        model: Any = self._model
        if self.text_config is model.config:
            stack: Any = model.base_model
        elif hasattr(model, "get_decoder"):
            stack = model.get_decoder()
        else:  # transformers 4.52
            stack = model.base_model.language_model
        if not isinstance(stack, nn.Module):  # the Llava of transformers 4.53 returns the method that would
            stack = stack()
        found: nn.Module = stack
        return found

    def projector(self) -> tuple[str, nn.Module] | None:
        """Return the projector and its name in the model; None if the model has none."""
        found = (each for each in self._model.named_modules() if each[0].rpartition(".")[2] == self.projector_name)
        return next(found, None)

    def newline(self) -> str | None:
        """Return the name of the embedding that ends each line of tiles; None if the model has none."""
        return next((name for name, _ in self._model.named_parameters() if name.rpartition(".")[2] == NEWLINE), None)

    def own_rows(self, rows: int) -> list[int]:
        """Return those of the first `rows` rows of the embedding that no family adds: they are the same in all."""
        return list(range(rows))

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMap | None:
        """Return the token map of a call of `forward`, from its arguments; None if they do not say it."""
        return None

    def explained(self, error: ValueError) -> TokenMapError | None:
        """Return what to say of an error that a call has ended with; None if there is nothing to add."""
        return None

    def canonical(self, name: str) -> str:
        """Return the name that a parameter of the model has in an adapter's file: LLaVA's."""
        return name

    def local(self, name: str) -> str:
        """Return the name in this model of a parameter that has the canonical `name`."""
        return name


class Spliced(Family):
    """LLaVA: the splice itself says where features and text are (`token_map.spliced`)."""

    name = "spliced"
    splices = True

    def local(self, name: str) -> str:
        found = self.projector()
        if found is None or not name.startswith(f"{PROJECTOR_PATH}."):
            return name
        whole = of_one_linear(name)
        if isinstance(found[1], nn.Linear):
            return whole.replace(f"{PROJECTOR_PATH}.0.", f"{PROJECTOR_PATH}.", 1)
        return whole if isinstance(found[1], nn.Sequential) else name


class Placeholder(Family):
    """transformers' own: as many placeholder tokens in the prompt as there are image features."""

    name = "placeholder"
    projector_name = "multi_modal_projector"

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._marks = placeholder_tokens(model.config)
        self._knows_videos = any(isinstance(getattr(model.config, name, None), int) for name in VIDEO_TOKENS)
        # Of the class: the model's own may be another's by then.
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMap | None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if given.get(FRAMES) is not None and not self._knows_videos:
            raise TokenMapError(
                f"{FRAMES} is given, and the config of this {type(self._model).__name__} names no token for frames of "
                "a video, so it is unknown which tokens they become. Give the frames as images."
            )
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            return None
        attention, labels = given.get("attention_mask"), given.get("labels")
        attended = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(attention, Tensor) and attention.shape == ids.shape:
            attended = attention.bool()
        visual = ids == self._marks[0]
        for mark in self._marks[1:]:
            visual = visual | (ids == mark)
        return of_images(visual, attended, labels)

    def explained(self, error: ValueError) -> TokenMapError | None:
        if (found := MISMATCH.search(str(error))) is None:
            return None
        kind, placeholders = found[1].lower(), found[2]
        return TokenMapError(
            f"the prompts hold {placeholders} placeholders for {kind}s, and the {kind}s have another number of "
            "features. Take the processor of the model's own folder, whose settings (patch_size, "
            "vision_feature_select_strategy, the number of tiles) are this model's; give as many images as prompts "
            "name; and cut no prompt (truncation, max_length) where an image is."
        )

    def own_rows(self, rows: int) -> list[int]:
        # Where the placeholders are behind all tokens that the language model had, the rows behind them fill it up.
        last = min((mark for mark in self._marks if mark >= rows // 2), default=rows)
        return [row for row in range(last) if row not in self._marks]

    @cached_property
    def _places(self) -> list[Place]:
        """The parts that LLaVA has elsewhere, those that are in others first."""
        paths = {id(module): name for name, module in self._model.named_modules()}
        named = {name.rpartition(".")[2]: name for name in sorted(paths.values(), key=len, reverse=True)}
        found = []
        if (newline := self.newline()) is not None:
            found.append(Place(newline, NEWLINE_PATH))
        if (projector := named.get(self.projector_name)) is not None:
            found.append(Place(projector, PROJECTOR_PATH, PARTS))
        if (tower := named.get(TOWER)) is not None:
            inside = f"{tower}.{INSIDE}"
            found.append(Place(inside if inside in paths.values() else tower, TOWER_PATH))
        model: Any = self._model
        if (head := paths.get(id(model.get_output_embeddings()))) is not None:
            found.append(Place(head, HEAD_PATH))
        stack = self.decoder()
        if (decoder := paths.get(id(stack))) is not None:
            found += [Place(f"{decoder}.{part}", f"{DECODER_PATH}.{part}") for part, _ in stack.named_children()]
        return found

    def canonical(self, name: str) -> str:
        return _first((place.to_llava(name) for place in self._places), name)

    def local(self, name: str) -> str:
        name = of_one_linear(name)
        return _first((place.from_llava(name) for place in self._places), name)


def _first(found: Iterable[str | None], otherwise: str) -> str:
    return next((each for each in found if each is not None), otherwise)


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model.

    Raises:
        SteeringError: of no family: an encoder-decoder model, or one of an old transformers that lays out images inside
            its `forward`, where nothing says which tokens they became; or one that takes no tokens.
    """
    config: Any = getattr(model, "config", None)
    embeddings = getattr(model, "get_input_embeddings", None)
    # A vision model embeds patches; the weight itself has no shape under ZeRO-3.
    if config is None or (embeddings is not None and not hasattr(embeddings(), "num_embeddings")):
        raise SteeringError(
            f"{type(model).__name__} has no embeddings of tokens, so it is no language model of transformers. Only "
            "decoder-only language models can be tuned, with or without images."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise SteeringError(
            f"{type(model).__name__} has an encoder and a decoder. Only decoder-only language models can be tuned."
        )
    if hasattr(model, SPLICE):
        return Spliced(model)
    if hasattr(model, MERGE):
        import transformers

        raise SteeringError(
            f"{type(model).__name__} of transformers {transformers.__version__} puts image features between text "
            "inside its forward, so it is unknown which tokens are visual. Use transformers 5, where the prompt holds "
            "a placeholder for each feature, or LLaVA's own class."
        )
    # Layers of cross-attention take images beside the tokens, not in their place.
    if placeholder_tokens(config) and not getattr(text_config(config), "cross_attention_layers", None):
        return Placeholder(model)
    return Family(model)


def text_config(config: Any) -> Any:
    """Return the config of the language model; the config itself where it is no model of several parts."""
    ask: Callable[..., Any] | None = getattr(config, "get_text_config", None)  # transformers 4.37 has none
    return getattr(config, "text_config", config) if ask is None else ask(decoder=True)


def placeholder_tokens(config: Any) -> list[int]:
    """Return the tokens that image features take the place of, by a model's config; none if it names none.

    Raises:
        SteeringError: the config names two for the same.
    """
    tokens = set()
    for names in PLACEHOLDERS:
        found = {name: token for name in names if isinstance(token := getattr(config, name, None), int)}
        if len(set(found.values())) > 1:
            listed = " and ".join(f"{name} {token}" for name, token in found.items())
            raise SteeringError(
                f"the config of this model has {listed}, so it is unknown which token image features take the place "
                "of. Set both to the one that its processor writes."
            )
        tokens |= set(found.values())
    return sorted(tokens)
