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
from llava_steering_plugin.errors import AdapterError, BaseMismatch, listing
from llava_steering_plugin.foreign_files import INDEX_BYTES, pinned, read_json

# As `llava-steering export` and transformers before 5 write them, and as transformers 5 does.
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class ServedBase:
    """Checks adapters against a base without its weights in memory.

    Args:
        model_config: of vLLM.
    """

    def __init__(self, model_config: Any):
        from transformers import LlavaForConditionalGeneration

        self.name = str(model_config.model)
        self.dtype: torch.dtype = model_config.dtype
        self._revision = model_config.revision
        with torch.device("meta"):
            self._model = LlavaForConditionalGeneration(model_config.hf_config)
        self._fits = fits(self._model)

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
        ids, rows = stored.tensors[FINGERPRINT + "ids"], stored.tensors[FINGERPRINT + "rows"]
        try:
            here = self._rows(ids.tolist(), rows.shape[1])
        except (OSError, ValueError, LookupError) as error:
            raise AdapterError(
                f"the adapter in {stored.path} cannot be compared with {self.name}: the embedding of the model cannot "
                f"be read from its safetensors ({error}). Start vLLM on a folder that `llava-steering export` wrote."
            ) from error
        if not alike(here, rows):
            raise BaseMismatch(
                listing(
                    f"the adapter in {stored.path} does not belong to {self.name}. It was trained on "
                    f"{stored.config.base.name_or_path}; export that (`llava-steering export`) and serve the result",
                    ["the embedding rows that identify the base differ: same shape, other weights"],
                )
            )

    def _rows(self, ids: list[int], width: int) -> Tensor:
        folder = Path(self.name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(self.name, revision=self._revision, local_files_only=True))
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
