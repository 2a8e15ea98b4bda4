"""Count the tokens of samples as a training sees them: with LLaVA's own code, images as what they become."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.components.base import ImageTokens, LanguageModel
from llava_steering_plugin.components.image_tokens import CONNECTOR, connected, tower_shape
from llava_steering_plugin.components.picture_layouts import layout_of
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.training.data.pictured import has_pictures
from llava_steering_plugin.upstream.model.language_models import chosen
from llava_steering_plugin.upstream.text.chat_templates import OF_TOKENIZER, offer
from llava_steering_plugin.upstream.text.picture_tokens import PictureTokens
from llava_steering_plugin.upstream.text.tokenizers import Tokenizers
from llava_steering_plugin.upstream.train.samples import KEEPING_THE_TEMPLATE
from llava_steering_plugin.upstream.train.targets import clear_first_prompts

USUAL_IMAGE_TOKENS = 576  # of LLaVA-1.5
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Length:
    """Tells how long a sample is.

    Attributes:
        tokens: all of them, before anything is cut off; an image counts as what it becomes.
        learned: tokens of answers that are left for the loss.
    """

    tokens: int
    learned: int


class TokenCounter:
    """Turns samples into tokens as LLaVA's train() does with these flags.

    Args:
        base: --model_name_or_path.
        version: --version.
        longest: --model_max_length.
        vision_tower: --vision_tower; None: the one that the base names.
        language_model: --language_model; None: by the base's model type.
        connector: --mm_projector_type; None: the one that the base names.
        pictures: how LLaVA-NeXT is to lay pictures out, the flags of its training with their folders; None: LLaVA
            trains.

    Raises:
        SteeringError: the base, or its tokenizer, cannot be read.
        ImportError: LLaVA cannot be imported.
    """

    def __init__(
        self,
        base: str,
        version: str,
        longest: int,
        vision_tower: str | None = None,
        language_model: str | None = None,
        connector: str | None = None,
        pictures: Mapping[str, Any] | None = None,
    ):
        from llava import conversation
        from llava.train.train import preprocess, preprocess_multimodal

        self._preprocess, self._preprocess_multimodal = preprocess, preprocess_multimodal
        if find(base) is not None:
            raise ArgumentsError(f"--model_name_or_path {base} is an adapter; give its base there.")
        described = read_config(base)
        self.longest = longest
        self.notes: list[str] = []
        tower = vision_tower or described.get("mm_vision_tower")
        self.image_tokens = self._image_tokens(described, tower, connector)
        self._pictures = None if pictures is None else self._in_next(described, tower, connector, pictures)
        model_type = str(described["model_type"])
        self.tokenizer = _tokenizer(base, longest, chosen(described, base, language_model), model_type)
        if version == OF_TOKENIZER:
            offer(self.tokenizer, base)
        self.settings = SimpleNamespace(
            is_multimodal=True, mm_use_im_start_end=bool(described.get("mm_use_im_start_end", False))
        )
        templates = conversation.conv_templates
        self.template = conversation.default_conversation
        if version not in KEEPING_THE_TEMPLATE:
            if version not in templates:
                self.notes.append(
                    f"--version {version} is no conversation template: LLaVA takes vicuna_v1, and a training with a "
                    "tuning mode refuses it"
                )
            self.template = templates.get(version, templates["vicuna_v1"])
        if version == "v0" and self.tokenizer.pad_token is None:
            self.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        elif version != "v0":
            self.tokenizer.pad_token = self.tokenizer.unk_token
        if self.settings.mm_use_im_start_end:
            from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN

            self.tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)

    def count(self, sample: Mapping[str, Any]) -> Length | None:
        """Return the length of a sound sample; None if its video's is not known. What LLaVA raises comes through."""
        from llava.constants import IMAGE_TOKEN_INDEX

        pictured = self._pictured(sample)
        of_each = self._pictures.of(sample) if pictured and self._pictures is not None else []
        if of_each is None:
            return None
        ids, labels = self._encoded(sample, self.longest)
        tokens = len(ids)
        if not pictured and tokens >= self.longest:  # cut off already
            tokens = len(self._encoded(sample, UNLIMITED)[0])
        images = ids == IMAGE_TOKEN_INDEX
        more = torch.zeros_like(ids)  # tokens that a mark becomes, beside itself
        more[images] = torch.tensor(of_each or [self.image_tokens]).expand(int(images.sum())) - 1
        # LLaVA cuts twice: before it puts the image's tokens in the place of the mark, and after that.
        ids, labels = ids[: self.longest], labels[: self.longest]
        positions = torch.arange(len(ids)) + more[: self.longest].cumsum(0)
        learned = (labels != IGNORED) & (positions < self.longest)
        return Length(tokens + int(more.sum()), int(learned.sum()))

    def _pictured(self, sample: Mapping[str, Any]) -> bool:
        return has_pictures(sample, several=self._pictures is not None)

    def _encoded(self, sample: Mapping[str, Any], longest: int) -> tuple[Tensor, Tensor]:
        sources, pictured = [copy.deepcopy(sample["conversations"])], self._pictured(sample)
        with self._template(), self._limit(longest), contextlib.redirect_stdout(io.StringIO()):  # LLaVA prints warnings
            if pictured:
                self._preprocess_multimodal(sources, self.settings)
            made = self._preprocess(sources, self.tokenizer, has_image=pictured)
            if self._pictures is not None:  # as in a training with a mode

                def prepare(turns: Any) -> Any:
                    return self._preprocess([turns], self.tokenizer, has_image=pictured)

                clear_first_prompts(made, sources, prepare)
        return made["input_ids"][0], made["labels"][0]

    @contextlib.contextmanager
    def _template(self) -> Iterator[None]:
        from llava import conversation

        before = conversation.default_conversation
        conversation.default_conversation = self.template
        try:
            yield
        finally:
            conversation.default_conversation = before

    @contextlib.contextmanager
    def _limit(self, longest: int) -> Iterator[None]:
        self.tokenizer.model_max_length = longest
        try:
            yield
        finally:
            self.tokenizer.model_max_length = self.longest

    def _in_next(
        self, described: Mapping[str, Any], tower: Any, connector: str | None, flags: Mapping[str, Any]
    ) -> PictureTokens:
        if not tower:
            raise ArgumentsError("the base names no vision tower; give --vision_tower, with which tokens are counted.")
        tokens, edge = _tile(described, tower, connector)
        found = PictureTokens(layout_of(flags, tokens, edge), flags.get("image_folder"), flags.get("video_folder"))
        found.check()
        self.notes += found.notes()
        return found

    def _image_tokens(self, described: Mapping[str, Any], tower: Any, connector: str | None) -> int:
        try:
            if not tower:
                raise SteeringError("the base names no vision tower; give --vision_tower")
            return _tile(described, tower, connector)[0].count
        except (SteeringError, LookupError, TypeError, ZeroDivisionError) as error:
            self.notes.append(f"{USUAL_IMAGE_TOKENS} tokens are assumed for an image: {error}")
            return USUAL_IMAGE_TOKENS


def _tile(described: Mapping[str, Any], tower: Any, connector: str | None) -> tuple[ImageTokens, int]:
    """Return what the language model gets for an image of one tile, and the tile's side in pixels."""
    shape = tower_shape({**described, "mm_vision_tower": tower}, _sized)
    found = connected(connector or described.get(CONNECTOR), shape.tokens, described.get("hidden_size", 1))
    return found, shape.image_size


def _sized(name: str) -> Mapping[str, Any]:
    """Return the sizes of LLaVA's own vision tower.

    Raises:
        SteeringError, LookupError: its config.json cannot be read, or names none.
    """
    settings = read_config(name)
    settings = settings.get("vision_config", settings)
    return {key: settings[key] for key in ("image_size", "patch_size")}


def _tokenizer(base: str, longest: int, component: type[LanguageModel] | None, model_type: str) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would warn of the first sample that is too long
    # A Qwen without a component is trained by LLaVA-NeXT, which takes the fast one for it alone.
    slow = {} if "mpt" in base or (component is None and "qwen" in model_type) else {"use_fast": False}
    loader = AutoTokenizer if component is None else Tokenizers(AutoTokenizer, component.name)
    try:
        return loader.from_pretrained(base, model_max_length=longest, padding_side="right", **slow)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise SteeringError(f"the tokenizer of {base} cannot be loaded: {error}") from error
