"""Reads LLaVA's training data as a training reads it, one sample at a time, for measurements on single samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.upstream.conversations import checked_template


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
        from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset

        self.model, self.conversation = model, checked_template(conversation)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token  # as upstream's training does
        described = SimpleNamespace(
            image_folder=str(images),
            image_processor=processor,
            is_multimodal=True,
            image_aspect_ratio=getattr(model.config, "image_aspect_ratio", "square"),
            mm_use_im_start_end=getattr(model.config, "mm_use_im_start_end", False),
        )
        try:
            self.dataset = LazySupervisedDataset(str(file), tokenizer, described)
        except (OSError, ValueError) as error:
            raise ArgumentsError(f"the data in {file} cannot be read: {error}") from error
        self.entries: list[Mapping[str, Any]] = self.dataset.list_data_dict
        self._collated = DataCollatorForSupervisedDataset(tokenizer)

    def loss(self, number: int) -> Tensor:
        """Return the training loss of the sample of that number, a scalar with a graph if gradients are on."""
        with self._template():
            batch = self._collated([self.dataset[number]])
        half = {"device": self.model.device, "dtype": self.model.get_vision_tower().dtype}
        batch = {
            name: value.to(**half) if name == "images" else value.to(self.model.device) for name, value in batch.items()
        }
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

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
