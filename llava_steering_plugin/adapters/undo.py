"""Undoes what a failed load has changed of a model itself, so that the model is untouched unless everything fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from llava_steering_plugin.adapters.added_tokens import embeddings, set_rows, token_ids
from llava_steering_plugin.adapters.folder import EXTRA, StoredAdapter
from llava_steering_plugin.adapters.parameters import set_parameters, shape_of
from llava_steering_plugin.adapters.quantised import put_back, quantised_linears
from llava_steering_plugin.distributed import gathered, is_partitioned, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Undo:
    """Notes how those parts of a model are that an adapter replaces: parameters of the base, and the vocabulary.

    Raises:
        AttributeError: the model has no such parameters; `check_tensors` finds that out before.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredAdapter):
        names = stored.section(EXTRA)
        self._model = model
        self._linears = quantised_linears(model, names)
        own = [name for name in names if name.rpartition(".")[0] not in self._linears]
        self._parameters = {name: model.get_parameter(name) for name in own}
        self._values = {name: whole(parameter) for name, parameter in self._parameters.items()}
        self._vocabulary = _Vocabulary(model, token_ids(stored)) if stored.config.added_tokens else None

    def __call__(self) -> None:
        """Make the model as it was."""
        put_back(self._model, self._linears)
        set_parameters(self._parameters, self._values)
        if self._vocabulary is not None:
            self._vocabulary.put_back()


class _Vocabulary:
    """The two layers with a row for each token, as they are before tokens are added.

    transformers resizes by new layers in some versions, and by new weights in the old layers in others.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor):
        self._model, self._layers = model, embeddings(model)
        self._sizes = model.config.vocab_size, model.__dict__.get("vocab_size")
        self._weights = {part: (layer.weight, layer.weight.data) for part, layer in self._layers.items()}
        self._counts = {
            part: {name: value for name, value in layer.__dict__.items() if name in ("num_embeddings", "out_features")}
            for part, layer in self._layers.items()
        }
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}
        for part, layer in self._layers.items():
            known = ids[ids < shape_of(layer.weight)[0]]
            with gathered([layer.weight]):
                self._rows[part] = known, layer.weight.detach()[known.to(layer.weight.device)].clone()

    def put_back(self) -> None:
        model: Any = self._model
        model.set_input_embeddings(self._layers["input"])
        model.set_output_embeddings(self._layers["output"])
        for part, layer in self._layers.items():
            layer.weight, data = self._weights[part]
            if not is_partitioned(layer.weight):
                layer.weight.data = data
            layer.__dict__.update(self._counts[part])
            set_rows(layer, *self._rows[part])
        model.config.vocab_size = self._sizes[0]
        if self._sizes[1] is not None:
            model.__dict__["vocab_size"] = self._sizes[1]
