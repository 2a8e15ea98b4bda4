"""The base of a released checkpoint: its structure, and its weights where they are on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fit.base_model import language_model, read_config
from llava_steering_plugin.adapters.fit.fingerprint import FINGERPRINT_COLUMNS, alike, fingerprint_rows
from llava_steering_plugin.adapters.stored.config import BaseModel
from llava_steering_plugin.adapters.stored.folder import ADDED, FINGERPRINT
from llava_steering_plugin.convert.released import Note, Released
from llava_steering_plugin.convert.torch_files import Weights
from llava_steering_plugin.errors import (
    AdapterError,
    ArgumentsError,
    BaseMismatch,
    SteeringError,
    listing,
    shortened,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Backbone:
    """A checkpoint's base.

    Attributes:
        name: folder or hub id.
        described: its config.json.
        model: its language model on the meta device: names and shapes, no values.
        weights: its tensors; None if they are not on this machine.
        reached: `described` is its own; otherwise it is what the checkpoint says of it.
    """

    name: str
    described: Mapping[str, Any]
    model: PreTrainedModel
    weights: Weights | None
    reached: bool

    def as_config(self) -> BaseModel:
        """Return the base as an adapter's config describes it."""
        config = self.model.config
        sizes = int(config.hidden_size), int(config.num_hidden_layers), int(config.vocab_size)
        return BaseModel(self.name, str(self.described["model_type"]), *sizes)

    def compare(self, released: Released) -> int:
        """Compare the base's tensors that a checkpoint repeats with the base's own, and return how many there are.

        Raises:
            BaseMismatch: some differ by more than the rounding of half precision, so it was trained on another base.
        """
        if self.weights is None:
            return 0
        problems, compared = [], 0
        for name in sorted(released.base.keys() & self.weights.keys()):
            here, there = released.base[name], self.weights[name]
            if name in self._vocabulary() and here.shape[1:] == there.shape[1:] and len(here) > len(there):
                here = here[: len(there)]  # the rest belongs to tokens that training added
            if here.shape != there.shape:
                problems.append(f"{name} is {list(here.shape)} in the checkpoint and {list(there.shape)} in the base")
            elif not alike(here, there):
                problems.append(f"{name} has other values")
            compared += 1
        if problems:
            raise BaseMismatch(
                listing(
                    f"{released.folder} was not trained on {self.name}, or its training changed the base itself; "
                    f"{len(problems)} of the {compared} tensors that both have differ. Give its base with --base",
                    shortened(problems),
                )
            )
        return compared

    def strangers(self, released: Released) -> list[Note]:
        """Note the tensors of a checkpoint that neither the adapter nor the base has a place for."""
        known = self.model.state_dict().keys()
        unknown = sorted(name for name in released.base if name not in known)
        if not unknown:
            return []
        names = ", ".join(shortened(unknown))
        return [Note(f"{len(unknown)} tensors", f"not carried over, the base has nothing of that name: {names}")]

    def projector(self, released: Released) -> dict[str, Tensor]:
        """Return those tensors of the checkpoint's projector that the base does not have."""
        own: Mapping[str, Tensor] = self.weights if self.weights is not None else {}
        return {
            name: value for name, value in released.projector.items() if name not in own or not alike(own[name], value)
        }

    def vocabulary(self, released: Released) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Return the tokens that training added; and the rows to store, theirs and those that identify the base.

        Raises:
            AdapterError: the embedding is nowhere, or holds rows of unknown tokens.
        """
        names = self._vocabulary()
        source: Mapping[str, Tensor] = self.weights if self.weights is not None else released.base
        if names[0] not in source:
            raise AdapterError(
                f"{released.folder} holds no embedding, and an adapter needs some rows of its base's to know it by. "
                f"{self.name} is no folder on this machine: download it and give the folder with --base."
            )
        embedding = source[names[0]]
        rows = min(len(embedding), int(self.model.config.vocab_size))
        ids = fingerprint_rows(rows)
        stored = {FINGERPRINT + "ids": ids, FINGERPRINT + "rows": embedding[ids, :FINGERPRINT_COLUMNS].float()}
        added = self._added(released, names[0], rows)
        if added:
            chosen = torch.tensor(list(added.values()))
            stored[ADDED + "input"] = released.base[names[0]][chosen]
            stored[ADDED + "output"] = released.base[names[-1]][chosen]
        return added, stored

    def _added(self, released: Released, embedding: str, rows: int) -> dict[str, int]:
        held = len(released.base[embedding]) if embedding in released.base else rows
        added = {token: number for token, number in released.added_tokens.items() if rows <= number < held}
        if held > rows and set(added.values()) != set(range(rows, held)):
            raise AdapterError(
                f"{released.folder} has {held} embedding rows and its base {self.name} has {rows}; added_tokens.json "
                "does not say which tokens the others stand for. Copy the tokenizer's files to the checkpoint."
            )
        return added

    def _vocabulary(self) -> tuple[str, str]:
        """Return the names of the input embedding and of the head."""
        inputs, outputs = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return names[id(inputs)], names[id(outputs)]


def find_backbone(released: Released, given: str | None) -> Backbone:
    """Find the base that `given` names, or else the checkpoint itself.

    Raises:
        ArgumentsError: neither names one.
        SteeringError: it cannot be found or read, or is no language model.
    """
    name = given or released.base_name
    if not name:
        raise ArgumentsError(
            f"{released.folder} does not say which model it was trained on. Name it with --base: a folder, or a hub id "
            "such as lmsys/vicuna-7b-v1.5."
        )
    folder, reached = Path(name).expanduser(), True
    try:
        described = read_config(str(folder) if folder.is_dir() else name)
    except SteeringError:
        if folder.is_dir() or released.config is None:
            raise
        # The base is not on this machine and the hub is out of reach: the checkpoint's own config has its sizes.
        kind = str(released.config.get("model_type")).removeprefix("llava_")
        described, reached = released.config | {"model_type": kind}, False
    model: Any = language_model(described, name)
    return Backbone(name, described, model, _local_weights(name, folder), reached)


def _local_weights(name: str, folder: Path) -> Weights | None:
    if folder.is_dir():
        weights = Weights.of(folder)
        if weights is None:
            raise AdapterError(f"{folder} holds no weights. Give the folder of the whole base with --base.")
        return weights
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Weights.of(Path(snapshot_download(name, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError, AdapterError):
        # The hub's cache has nothing of it or a part only; it is compared where it is whole.
        return None
