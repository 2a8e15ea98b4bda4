"""Reads LLaVA's training data as a training reads it, one sample at a time, for measurements on single samples."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.token_map import IGNORED, signature_of, spliced
from llava_steering_plugin.upstream.text.conversations import checked_template

_OF_TILES = dict.fromkeys(("image_grid_pinpoints", "image_crop_resolution", "image_split_resolution"))


class Score(NamedTuple):
    """Says how well a model predicts the tokens of a sample's answers; NaN if there are none.

    Attributes:
        loss: their mean negative log-likelihood.
        accuracy: the share of them that is the likeliest.
        tokens: how many they are.
    """

    loss: float
    accuracy: float
    tokens: int


def score_of(logits: Tensor, labels: Tensor) -> Score:
    """Return how well logits [rows, positions, vocabulary] predict labels, int64 [rows, positions]."""
    following = labels[:, 1:]
    counted = following != IGNORED
    predicted, wanted = logits[:, :-1][counted].float(), following[counted].to(logits.device)
    loss = torch.nn.functional.cross_entropy(predicted, wanted)
    right = (predicted.argmax(-1) == wanted).float().mean()
    return Score(float(loss), float(right), len(wanted))


class TrainingSamples:
    """Holds the samples of one data file for a model that `load_pretrained_model` has loaded.

    Args:
        processor: the image processor that came with the model.
        file: LLaVA's JSON of conversations.
        images: the folder of the images that it names.
        conversation: the conversation template, as a training's `--version` gives it.

    Raises:
        ArgumentsError: the file cannot be read, or there is no such template.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any, file: Path, images: Path, conversation: str):
        from llava.train.train import DataArguments, DataCollatorForSupervisedDataset, LazySupervisedDataset

        self.model, self.conversation = model, checked_template(conversation)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token  # as upstream's training does
        described = DataArguments(image_folder=str(images), is_multimodal=True)
        # What a training sets beside its flags. LLaVA-NeXT has more of it, and its config has all of that.
        for name, default in {"image_aspect_ratio": "square", "mm_use_im_start_end": False, **_OF_TILES}.items():
            setattr(described, name, getattr(model.config, name, default))
        described.image_processor = processor
        try:
            self.dataset = LazySupervisedDataset(str(file), tokenizer, described)
        except (OSError, ValueError) as error:
            raise ArgumentsError(f"the data in {file} cannot be read: {error}") from error
        self.entries: list[Mapping[str, Any]] = self.dataset.list_data_dict
        self._collated = DataCollatorForSupervisedDataset(tokenizer)

    def loss(self, number: int) -> Tensor:
        """Return the training loss of the sample of that number, a scalar with a graph if gradients are on."""
        loss: Tensor = self.model(**self.batch(number), use_cache=False).loss
        return loss

    def batch(self, number: int) -> dict[str, Any]:
        """Return the arguments of the model's `forward` for the sample of that number, on the model's device."""
        with self._template():
            batch = self._collated([self.dataset[number]])
        device, tower = self.model.device, self.model.get_vision_tower()
        if "images" in batch:
            batch["images"] = _moved(batch["images"], device=device, dtype=tower.dtype)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def scored(self, number: int) -> Callable[[], Score]:
        """Return a function that passes the sample of that number through the model, and scores its answers' tokens.

        The sample is prepared once, for any number of passes.
        """
        batch = self.batch(number)
        # The class's own method: an adapter on the model has shadowed the model's, and is not asked here.
        splice = types.MethodType(type(self.model).prepare_inputs_labels_for_multimodal, self.model)
        known = signature_of(splice).parameters
        given = {"images": None, **{name: value for name, value in batch.items() if name in known}}
        with torch.inference_mode():
            (*_, labels), _ = spliced(splice, **given, position_ids=None, past_key_values=None)

        def score() -> Score:
            with torch.inference_mode():
                return score_of(self.model(**batch, use_cache=False).logits, labels)

        return score

    @contextmanager
    def _template(self) -> Iterator[None]:
        """Make the template the default of LLaVA's module, which its preprocessing reads, inside the block."""
        from llava import conversation

        before = conversation.default_conversation
        conversation.default_conversation = conversation.conv_templates[self.conversation]
        try:
            yield
        finally:
            conversation.default_conversation = before


def _moved(images: Tensor | list[Tensor], **to: Any) -> Tensor | list[Tensor]:
    return [each.to(**to) for each in images] if isinstance(images, list) else images.to(**to)
