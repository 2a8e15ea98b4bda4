"""The base that vLLM serves, as far as its files tell it: its shapes, and the embedding rows that identify it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llava_steering_plugin.adapters.fit.compatibility import fits
from llava_steering_plugin.adapters.fit.fingerprint import alike
from llava_steering_plugin.adapters.stored.folder import FINGERPRINT, StoredAdapter
from llava_steering_plugin.errors import AdapterError, BaseMismatch
from llava_steering_plugin.foreign_files import INDEX_BYTES, pinned, read_json

# As `llava-steering export` and transformers before 5 write them, and as transformers 5 does.
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class ServedBase:
    """Checks adapters against a base without its weights in memory.

    Args:
        name: a folder in transformers' layout, or a hub id.
        config: its config, of transformers.
        revision: of the hub id.
    """

    def __init__(self, name: str, config: Any, revision: str | None = None):
        from transformers import LlavaForConditionalGeneration

        self.name = name
        self._revision = revision
        with torch.device("meta"):
            self._model = LlavaForConditionalGeneration(config)
        self._fits = fits(self._model)

    @classmethod
    def of(cls, model_config: Any) -> ServedBase:
        """Return the base of vLLM's config of a model."""
        return cls(str(model_config.model), model_config.hf_config, model_config.revision)

    def check(self, outline: StoredAdapter) -> None:
        """Check the sizes of an adapter and of its base, before any tensor is read.

        Raises:
            AdapterError: names or shapes do not fit; all in one message.
            BaseMismatch: it was trained on a base of other sizes.
        """
        self._fits(outline)

    def check_weights(self, stored: StoredAdapter) -> None:
        """Compare the embedding rows that an adapter knows of its base with those in the base's files.

        Raises:
            AdapterError: the base's files cannot be read.
            BaseMismatch: the rows differ.
        """
        folder = Path(self.name)
        try:
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(self.name, revision=self._revision, local_files_only=True))
            problem = other_base(stored, folder, self.name)
        except (OSError, ValueError, LookupError) as error:
            raise AdapterError(
                f"the adapter in {stored.path} cannot be compared with {self.name}: the embedding of the model cannot "
                f"be read from its safetensors ({error}). Start vLLM on a folder that `llava-steering export` wrote."
            ) from error
        if problem is not None:
            raise BaseMismatch(f"the adapter in {stored.path} does not belong to this base: {problem}.")


def other_base(stored: StoredAdapter, folder: Path, name: str) -> str | None:
    """Say that an adapter belongs to another base than that in a folder in transformers' layout; None: it does not.

    Args:
        name: of the base, for the text.

    Raises:
        OSError, ValueError, LookupError: the embedding cannot be read from the folder.
    """
    ids, rows = stored.tensors[FINGERPRINT + "ids"], stored.tensors[FINGERPRINT + "rows"]
    if alike(_rows(folder, ids.tolist(), rows.shape[1]), rows):
        return None
    trained_on = stored.config.base.name_or_path
    return (
        f"the embedding rows that identify the base differ from those of {name}: same shape, other weights. It was "
        f"trained on {trained_on}; export that (`llava-steering export`) and serve the result"
    )


def _rows(folder: Path, ids: list[int], width: int) -> Tensor:
    held: dict[str, str] = {}
    if (folder / INDEX).is_file():
        held = read_json(folder / INDEX, INDEX_BYTES)["weight_map"]
    for name in EMBEDDINGS:
        file = folder / held.get(name, SINGLE)
        if not file.is_file():
            continue
        with pinned(file) as pinned_file, safe_open(pinned_file, framework="pt") as tensors:
            if name in tensors.keys():
                embedding = tensors.get_slice(name)
                if max(ids) >= embedding.get_shape()[0]:
                    raise ValueError(f"it has {embedding.get_shape()[0]} rows, and the adapter knows {max(ids)}")
                return torch.cat([embedding[number : number + 1, :width] for number in ids])
    raise ValueError(f"none of {', '.join(EMBEDDINGS)} is in {folder}")
