"""Keep what an adapter replaces of its base: to give it back, and to answer as the base where the adapter is off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.fit.quantised import is_quantised, put_back, quantised_linears
from llava_steering_plugin.adapters.parameters import set_parameters
from llava_steering_plugin.adapters.parts.image_parts import (
    image_parameters,
    image_settings,
    takes_images,
    tower_settings,
)
from llava_steering_plugin.adapters.parts.vocabulary import Vocabulary
from llava_steering_plugin.adapters.stored.folder import EXTRA, StoredAdapter
from llava_steering_plugin.distributed import whole
from llava_steering_plugin.hooks.families import text_config
from llava_steering_plugin.hooks.look_alike import look_alike, placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_MISSING = object()


class Original:
    """The base as an adapter found it: the parts that it replaces, or that are usually trained with it.

    Values wait in CPU memory until the base first answers; from then on they are where their parameters are, so that no
    call copies them.

    Args:
        model: before anything is changed.
        stored: the adapter that is to come; None for a fresh one.
        tokenizer: which gets the adapter's own tokens.

    Raises:
        AttributeError: the model has no such parameters; `check_tensors` finds that out before.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredAdapter | None = None, tokenizer: Any = None):
        self._model = model
        extras = stored.section(EXTRA) if stored is not None else {}
        self._linears = quantised_linears(model, extras)
        names = sorted({*image_parameters(model), *extras})
        with torch.inference_mode(False):
            self._values = {name: whole(model.get_parameter(name)) for name in names if self._may_change(name)}
            grows = stored is not None and stored.config.added_tokens
            self._vocabulary = Vocabulary(model, stored, tokenizer) if stored is not None and grows else None
        self._config: dict[str, Any] = {}
        self._tower: tuple[Any, str | None, dict[str, Any]] = (None, None, {})
        self._lent: str | None = None

    def _may_change(self, name: str) -> bool:
        """Tell whether a parameter can be set in place; packed ones are replaced with their linear."""
        host = self._model.get_submodule(name.rpartition(".")[0])
        return not is_quantised(host) and not self._model.get_parameter(name).is_meta

    def settle(self) -> None:
        """Note that the adapter is on: what can be made from the model's present parts need not be kept."""
        if self._vocabulary is not None:
            self._vocabulary.settle()

    def set_config(self, values: Mapping[str, Any]) -> None:
        """Change entries of the model's config, and remember what they were."""
        config = self._model.config
        for key, value in values.items():
            before = getattr(config, key, _MISSING)
            if before is _MISSING or before != value:
                self._config.setdefault(key, before)
                setattr(config, key, value)

    def set_images(self, trained: Mapping[str, Any]) -> None:
        """Cut, encode and mark images as in training, where the base's own config says otherwise.

        Args:
            trained: LLaVA's config of the training.
        """
        if not takes_images(self._model):
            return
        model: Any = self._model
        if hasattr(model.config, "mm_vision_select_feature"):
            trained = {"mm_vision_select_feature": "patch", **trained}  # what upstream takes where there is none
        settings = tower_settings(model, trained)
        self.set_config(image_settings(trained))
        tower = model.get_vision_tower()
        path = next((name for name, module in model.named_modules() if module is tower), None)
        before = {name: getattr(tower, name) for name, value in settings.items() if getattr(tower, name) != value}
        self._tower = (tower, path, before)
        for name in before:
            setattr(tower, name, settings[name])

    def lend_projector(self, base: str) -> None:
        """Count the adapter's projector as the base's, which is a plain language model and has none.

        Args:
            base: the language model, for the warning that says so.
        """
        self._lent = base
        with torch.inference_mode(False):
            self._values |= {name: whole(parameter) for name, parameter in image_parameters(self._model).items()}

    def put_back(self) -> None:
        """Make the model, its config and its tokenizer as they were."""
        self._say_that_it_is_lent()
        if self._vocabulary is not None:
            self._vocabulary.put_back()
        put_back(self._model, self._linears)
        parameters = {name: self._model.get_parameter(name) for name in self._values}
        set_parameters(parameters, self._values)
        _restore(self._model.config, self._config)
        tower, _, settings = self._tower
        _restore(tower, settings)
        self._config, self._tower = {}, (None, None, {})

    def config(self) -> Any:
        """Return the base's own config."""
        config: Any = self._model.config
        if not self._config and self._vocabulary is None:
            return config
        own = copy.copy(config)
        _restore(own, self._config)
        if self._vocabulary is not None:
            if text_config(config) is not config:
                own = copy.deepcopy(own)  # the language model's sizes are in a part of it
            text_config(own).vocab_size = self._vocabulary.size
        return own

    def model(self) -> PreTrainedModel | None:
        """Return the base as a model of its own, which shares with this one all that the adapter has left alone.

        None: the two are the same but for the adapter's modules.
        """
        config = self.config()
        tensors, modules = self._tensors(), dict(self._linears)
        attributes: dict[str, dict[str, Any]] = {}
        if self._vocabulary is not None:
            tensors |= self._vocabulary.tensors()
            attributes |= self._vocabulary.attributes()
        _, path, settings = self._tower
        if path is not None and settings:
            attributes[path] = settings
        if config is not self._model.config:
            holders = [name for name in ("", self._model.base_model_prefix) if self._holds_config(name)]
            attributes |= {name: {**attributes.get(name, {}), "config": config} for name in holders}
        if not (tensors or modules or attributes):
            return None
        self._say_that_it_is_lent()
        return look_alike(self._model, tensors, modules, attributes)

    def projector(self, path: str) -> nn.Module | None:
        """Return the base's own projector, which is at `path` in the model; None if it is the model's."""
        base = self.model()
        found = base.get_submodule(path) if base is not None else None
        return None if found is self._model.get_submodule(path) else found

    def check_ids(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse tokens that the base does not know, in the arguments of a call that is to be the base's.

        Raises:
            TokenMapError: there are some.
        """
        if self._vocabulary is not None:
            self._vocabulary.check_ids(args, kwargs)

    def _holds_config(self, path: str) -> bool:
        found = getattr(self._model, path, None) if path else self._model
        return isinstance(found, nn.Module) and found.__dict__.get("config") is self._model.config

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, value in self._values.items():
            host = self._model.get_submodule(name.rpartition(".")[0])
            parameter = self._model.get_parameter(name)
            if (here := placed(value, parameter, host)) is not value:
                self._values[name] = here
            found[name] = here
        return found

    def _say_that_it_is_lent(self) -> None:
        if self._lent is not None:
            logger.warning(
                "%s, the base of this adapter, is a plain language model and has no projector. Without the adapter, "
                "images still go through the adapter's projector as it was loaded; text is answered as by the base.",
                self._lent,
            )
            self._lent = None


def _restore(target: Any, values: Mapping[str, Any]) -> None:
    """Set attributes to what they were, or take away those that were not there."""
    for name, value in values.items():
        if value is not _MISSING:
            setattr(target, name, value)
        elif hasattr(target, name):
            delattr(target, name)
