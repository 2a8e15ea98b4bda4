"""The contract of a component: what a vision tower, a connector or a language model says of itself and builds.

A component is a description: it knows its sizes from files of settings alone, and makes modules only when asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_steering_plugin.components.chat_format import ChatFormat


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image, or of one tile of it.

    Attributes:
        count: how many there are.
        width: features of each.
        side: tokens of a row, and of a column, where they stand for squares of the image, row by row; None where
            positions have no place in the image.
        leading: tokens before those of the squares, such as a class token. `count` holds them too.
        parts: widths of the towers whose features lie side by side in each token; empty where there is one tower.
    """

    count: int
    width: int
    side: int | None = None
    leading: int = 0
    parts: tuple[int, ...] = ()


def setting(default: Any, help: str) -> Any:
    """Declare a setting of a component: a dataclass field with a default and a word on what it does."""
    return field(default=default, metadata={"help": help})


class Component(ABC):
    """Parent of all components.

    Attributes:
        name: the name of the entry point, by which a flag asks for the component: lower case, without a colon.
        summary: says in a few words what it is.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    @classmethod
    def missing(cls) -> str:
        """Return what is not installed here and is needed, and how to install it; the empty string if all is there."""
        return ""


@dataclass(frozen=True)
class Tower(Component):
    """Describes a vision tower: `--vision_tower NAME`, or `NAME:SOURCE`. Register it as `llava_steering.towers`.

    The module that LLaVA holds is made around it by `components.vision_tower`: it moves, freezes and casts the encoder,
    keeps it in evaluation mode, and tells LLaVA the sizes.

    Attributes:
        source: what stands behind the colon, such as a folder or a name on the hub; empty without a colon.
        layer: --mm_vision_select_layer.
        feature: --mm_vision_select_feature, "patch" or "cls_patch".
        takes_4bit: False if the tower cannot be used in a training or a model with a backbone of 4 or 8 bits.
    """

    source: str
    layer: int = -1
    feature: str = "patch"
    takes_4bit: ClassVar[bool] = True

    @abstractmethod
    def shape(self) -> TowerShape:
        """Return the sizes, from files of settings alone: no weights are opened, and nothing large is imported.

        Raises:
            SteeringError: the source is none of this tower's, its processor is missing, or `layer` or `feature` is
                something that the tower does not have.
        """

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the encoder without its weights. It is called on the meta device: `llava-steering plan` counts it."""

    @abstractmethod
    def load(self) -> nn.Module:
        """Return the encoder with its weights, in CPU memory."""

    @abstractmethod
    def image_processor(self) -> Any:
        """Return what prepares images for the tower, as CLIPImageProcessor of transformers does."""

    @abstractmethod
    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return the tokens of images, [images, count, width].

        Args:
            encoder: as `load` returned it, on any device and in any dtype.
            pixels: [images, 3, image_size, image_size], in the encoder's dtype and on its device.
        """


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a vision tower.

    Attributes:
        image_size: side of the square image that it takes, in pixels.
        tokens: what an image becomes.
        layers: how many layers `--mm_vision_select_layer` counts; None where it counts none.
    """

    image_size: int
    tokens: ImageTokens
    layers: int | None = None


@dataclass(frozen=True)
class Connector(Component):
    """Describes a connector: `--mm_projector_type NAME`. Register it as `llava_steering.connectors`.

    Subclass it as a frozen dataclass; its fields are settings, declared with `setting`, that follow a colon:
    `--mm_projector_type qformer:queries=64,layers=4`. They are int, float, bool or str.
    """

    def problems(self, tokens: ImageTokens, width: int) -> list[str]:
        """Return everything wrong with the settings, or with the sizes for these settings, one sentence each.

        Args:
            tokens: what the tower gives.
            width: of the language model.
        """
        return []

    def tokens(self, tokens: ImageTokens, width: int) -> ImageTokens:
        """Return what the language model gets for these tokens of the tower; by default as many, in the same places."""
        return ImageTokens(tokens.count, width, tokens.side, tokens.leading)

    @abstractmethod
    def build(self, tokens: ImageTokens, width: int) -> nn.Module:
        """Return the module, which makes [images, tokens', width] of [images, tokens, tokens.width].

        It is called with sizes without problems, also on the meta device. All parameters are trained, and what is
        saved are parameters: a buffer is not. A parameter's name must hold neither `lora_` nor `mm_projector`, for
        which LLaVA looks, nor `gamma` or `beta`, which transformers renames.
        """


class LanguageModel(Component):
    """Describes a family of language models: `--language_model NAME`. Register it as `llava_steering.language_models`.

    The LLaVA is made of transformers' own causal model. Its decoder must be its attribute `model`, with `embed_tokens`.
    `model_type` in config.json finds it without its name, where LLaVA has no class of its own for that type.

    Attributes:
        model_type: of the plain language models, in their config.json.
        llava_type: of the LLaVAs that are made of them; "llava_" and the model type by default.
        other_llava_types: that forks of LLaVA give the same LLaVAs.
        version: the name of the conversation template that suits them, for `--version`.
        since: the first version of transformers that has this model type.
    """

    model_type: ClassVar[str]
    llava_type: ClassVar[str] = ""
    other_llava_types: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[str] = "tokenizer"
    since: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.llava_type = cls.llava_type or f"llava_{cls.model_type}"

    @classmethod
    def llava_types(cls) -> tuple[str, ...]:
        """Return all types that these LLaVAs have, here and in forks."""
        return cls.llava_type, *cls.other_llava_types

    @classmethod
    def formats(cls) -> dict[str, ChatFormat]:
        """Return chat formats by the names of their conversation templates, where LLaVA has none that suits."""
        return {}

    @classmethod
    def causal_class(cls) -> Any:
        """Return transformers' class of the language model.

        Raises:
            KeyError: this version of transformers has none; `missing` says which has.
        """
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[cls.model_type]]

    @classmethod
    def missing(cls) -> str:
        """Return which transformers is needed, if the one that is installed does not have this model type."""
        import transformers

        if cls.model_type in transformers.CONFIG_MAPPING:
            return ""
        needed = f"transformers {cls.since} or newer" if cls.since else "another version of transformers"
        return f"{needed}; {transformers.__version__} is installed, and knows no {cls.model_type}"
