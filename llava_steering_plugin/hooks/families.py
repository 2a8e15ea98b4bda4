"""The families of models: where each keeps its decoder and its projector, and how it says which tokens are visual.

A family is chosen by what a model has, never by the name of its class:

- spliced: LLaVA, its versions and forks. They put image features between text in a method of their own, the splice.
- placeholder: transformers' own classes. The prompt holds a token for every image feature, which takes its place.
- told: all other decoder-only language models. `token_map()` says which positions are visual.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.token_map import TokenMap, of_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLICE = "prepare_inputs_labels_for_multimodal"
# Entries of a config that hold the token which image features take the place of, and the one for frames of a video.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# LLaVA's name for the module between vision tower and decoder, and its names for that module's parts, by those of
# transformers.
PROJECTOR = "mm_projector"
PARTS = {"linear_1": "0", "linear_2": "2"}
# The method by which older versions of transformers put the features in place while `forward` runs.
MERGE = "_merge_input_ids_with_image_features"


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
        stack: nn.Module = model.base_model if self.text_config is model.config else model.get_decoder()
        return stack

    def projector(self) -> tuple[str, nn.Module] | None:
        """Return the projector and its name in the model; None if the model has none."""
        found = (each for each in self._model.named_modules() if each[0].rpartition(".")[2] == self.projector_name)
        return next(found, None)

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMap | None:
        """Return the token map of a call of `forward`, from its arguments; None if they do not say it."""
        return None

    def canonical(self, name: str) -> str:
        """Return the name that a parameter of the model beside the decoder has in an adapter's file: LLaVA's."""
        return name

    def local(self, name: str) -> str:
        """Return the name in this model of a parameter that has the canonical `name`."""
        return name


class Spliced(Family):
    """LLaVA: the splice itself says where features and text are (`token_map.spliced`)."""

    name = "spliced"
    splices = True


class Placeholder(Family):
    """transformers' own: as many placeholder tokens in the prompt as there are image features."""

    name = "placeholder"
    projector_name = "multi_modal_projector"

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._marks = placeholder_tokens(model.config)
        # Of the class: the model's own may be another's by then.
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMap | None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
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

    def canonical(self, name: str) -> str:
        return self._renamed(name, self.projector_name, PROJECTOR, PARTS)

    def local(self, name: str) -> str:
        return self._renamed(name, PROJECTOR, self.projector_name, {theirs: ours for ours, theirs in PARTS.items()})

    @staticmethod
    def _renamed(name: str, before: str, after: str, parts: Mapping[str, str]) -> str:
        head, found, rest = name.partition(f".{before}.")
        part, *leaf = rest.split(".")
        return ".".join([head, after, parts.get(part, part), *leaf]) if found else name


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model.

    Raises:
        SteeringError: of no family: an encoder-decoder model, or one of an old transformers that lays out images inside
            its `forward`, where nothing says which tokens they became.
    """
    config: Any = model.config
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
    return config if ask is None else ask(decoder=True)


def placeholder_tokens(config: Any) -> list[int]:
    """Return the tokens that image features take the place of, by a model's config; none if it names none."""
    found = (getattr(config, name, None) for name in PLACEHOLDERS)
    return sorted({token for token in found if isinstance(token, int)})
