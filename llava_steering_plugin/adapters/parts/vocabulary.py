"""A base's own vocabulary, while an adapter's tokens are in its layers and its tokenizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.parameters import shape_of
from llava_steering_plugin.adapters.parts.added_tokens import embeddings, set_rows, token_ids
from llava_steering_plugin.adapters.stored.folder import ADDED, StoredAdapter
from llava_steering_plugin.distributed import gathered, is_partitioned, whole
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.families import text_config
from llava_steering_plugin.hooks.look_alike import placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_COUNTS = ("num_embeddings", "out_features")


class Vocabulary:
    """The two layers with a row for each token, and the tokenizer, as they are before tokens are added.

    transformers resizes by new layers in some versions, and by new weights in the old layers in others.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any):
        self._model, self._layers = model, embeddings(model)
        self.size: int = text_config(model.config).vocab_size
        self._attribute = model.__dict__.get("vocab_size")
        self._paths = {
            part: next(name for name, module in model.named_modules() if module is layer)
            for part, layer in self._layers.items()
        }
        self._weights: dict[str, tuple[Any, Any]] = {
            part: (layer.weight, layer.weight.data) for part, layer in self._layers.items()
        }
        self._biases = {part: getattr(layer, "bias", None) for part, layer in self._layers.items()}
        self._counts = {
            part: {name: value for name, value in layer.__dict__.items() if name in _COUNTS}
            for part, layer in self._layers.items()
        }
        self._lengths = {part: shape_of(layer.weight)[0] for part, layer in self._layers.items()}
        self._settled = False
        self._grown: dict[str, int] = {}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept: dict[str, Tensor] = {}
        ids = token_ids(stored)
        for part, layer in self._layers.items():
            within = ids < self._lengths[part]
            known = ids[within]
            with gathered([layer.weight]):
                here = layer.weight.detach()[known.to(layer.weight.device)].clone()
            self._rows[part] = known, here
            changed = not torch.equal(here.cpu(), stored.tensors[ADDED + part][within].to(here.dtype))
            if changed or is_partitioned(layer.weight):
                # No part of the layer as it will be has these rows and is as large as the base's: keep the base's.
                self._kept[part] = whole(layer.weight)
        self._tokenizer = None if tokenizer is None else _TokenizerState(tokenizer)

    def settle(self) -> None:
        """Note that the tokens are in; drop what the present layers hold, too."""
        present = embeddings(self._model)
        rows = {part: shape_of(layer.weight)[0] for part, layer in present.items()}
        grown = {part: count for part, count in rows.items() if count != self._lengths[part]}
        weights: dict[str, tuple[Any, Any]] = {}
        for part, (weight, data) in self._weights.items():
            weights[part] = (weight, None)
            if part in grown:
                present[part].train(self._layers[part].training)
                present[part].weight.requires_grad_(weight.requires_grad)
                weights[part] = (weight, data if is_partitioned(weight) else data.new_empty(0))
        if self._tokenizer is not None:
            self._tokenizer.settle()
        # Nothing below can fail: what has been dropped cannot be put back.
        self._settled, self._grown, self._weights = True, grown, weights
        for weight, data in weights.values():
            if data is not None:
                weight.data = data

    def put_back(self) -> None:
        """Take the tokens out again, unless others were added after them."""
        model: Any = self._model
        present = embeddings(model)
        if any(shape_of(present[part].weight)[0] != rows for part, rows in self._grown.items()):
            logger.warning("the vocabulary was resized after the adapter was loaded, so it keeps its size.")
            for part, layer in present.items():
                set_rows(layer, *self._rows[part])
            return
        cut = {part: self._cut(present[part], part) for part in self._grown}
        states = {part: (present[part].training, present[part].weight.requires_grad) for part in self._grown}
        model.set_input_embeddings(self._layers["input"])
        model.set_output_embeddings(self._layers["output"])
        for part, layer in self._layers.items():
            layer.weight, data = self._weights[part]
            if part in cut:
                layer.weight.data, bias = cut[part]
                if bias is not None:
                    layer.bias, layer.bias.data = self._biases[part], bias
                training, wants_grad = states[part]
                layer.train(training)
                layer.weight.requires_grad_(wants_grad)
            elif not self._settled and not is_partitioned(layer.weight):
                layer.weight.data = data
            layer.__dict__.update(self._counts[part])
            set_rows(layer, *self._rows[part])
        text_config(model.config).vocab_size = self.size
        if self._attribute is not None:
            model.__dict__["vocab_size"] = self._attribute
        if self._tokenizer is not None:
            self._tokenizer.put_back()
        self._settled, self._grown = False, {}
        self._weights = {part: (layer.weight, layer.weight.data) for part, layer in self._layers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the base's own weights of the two layers, by their names in the model."""
        found = {}
        for part, layer in embeddings(self._model).items():
            path, count = self._paths[part], self._lengths[part]
            if part in self._kept:
                self._kept[part] = placed(self._kept[part], layer.weight, layer)
                found[f"{path}.weight"] = self._kept[part]
            elif part in self._grown:
                found[f"{path}.weight"] = layer.weight[:count]
            if part in self._grown and getattr(layer, "bias", None) is not None:
                found[f"{path}.bias"] = layer.bias[:count]
        return found

    def attributes(self) -> dict[str, dict[str, Any]]:
        """Return what the two layers and the model say of the base's own sizes, by path."""
        found = {self._paths[part]: self._counts[part] for part in self._grown}
        return found | ({"": {"vocab_size": self._attribute}} if self._attribute is not None else {})

    def check_ids(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse tokens beyond the base's own: on a GPU, an index out of range ends the process."""
        if "input" not in self._grown:
            return
        given = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs"))
        for ids in given:
            if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.numel():
                unknown = sorted(set(ids[ids >= self._lengths["input"]].tolist()))
                if unknown:
                    raise TokenMapError(
                        f"the prompt has tokens that the adapter has added (ids {unknown}); where it is switched off, "
                        f"the base knows {self._lengths['input']} tokens. Write the prompt without them."
                    )

    def _cut(self, layer: Any, part: str) -> tuple[Tensor, Tensor | None]:
        """Return the base's rows of a layer that has grown, on its device and in its dtype, and those of its bias."""
        weight, data = self._weights[part]
        count, bias = self._lengths[part], getattr(layer, "bias", None)
        rows = data if is_partitioned(weight) else layer.weight.data[:count].clone()
        return rows, None if bias is None else bias.data[:count].clone()


class _TokenizerState:
    """What adding tokens changes of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Not the sentencepiece model, which stays as it is and whose copies are never equal.
        ours = ("builtins", "tokenizers", "transformers")
        self._before: dict[str, Any] = copy.deepcopy(
            {name: value for name, value in vars(tokenizer).items() if type(value).__module__.partition(".")[0] in ours}
        )
        self._length: int | None = None

    def settle(self) -> None:
        now = vars(self._tokenizer)
        self._before = {name: value for name, value in self._before.items() if value != now.get(name)}
        self._length = len(self._tokenizer)

    def put_back(self) -> None:
        if self._length is not None and len(self._tokenizer) != self._length:
            logger.warning("the tokenizer has got more tokens after the adapter was loaded, so it keeps them all.")
            return
        vars(self._tokenizer).update(self._before)
