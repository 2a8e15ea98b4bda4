"""Adapters that bring their own projector or image_newline, on models whose prompts hold a placeholder a feature.

transformers' own classes make the features of all images of a call in one method, image by image, and put them in the
places of the placeholders: those of the first row, then those of the second. So the placeholders tell whose an image
is. The method runs once for every projector among the rows, over what the vision tower has given the first time; of
each image those features are taken that the row's own projector has made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import ArgumentsError, TokenMapError
from llava_steering_plugin.hooks.families import PLACEHOLDERS, TOWER, family_of
from llava_steering_plugin.hooks.look_alike import look_alike, placed
from llava_steering_plugin.pool.adapter import PooledAdapter
from llava_steering_plugin.pool.projectors import ServedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The methods that make features, and the entries of the config that hold the token whose places they take.
METHODS: Mapping[str, tuple[str, ...]] = dict(
    zip(("get_image_features", "get_video_features"), PLACEHOLDERS, strict=True)
)
# What a call may be given in place of images; they have been through the base's projector.
READY_MADE = "mm_encoder_outputs"


def maker_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the module whose methods make image features; None if there is none."""
    return next((each for each in (model.base_model, model) if hasattr(each, "get_image_features")), None)


class ImageFeatures:
    """Shadows the methods of a model that make features.

    Args:
        model: transformers' own.
        serving: returns the rows of the present call, if features of their own are to be made; else None.
    """

    def __init__(self, model: PreTrainedModel, serving: Callable[[], ServedRows | None]):
        family = family_of(model)
        self._model, self._serving, self._maker = model, serving, maker_of(model)
        found, self._newline = family.projector(), family.newline()
        self._projector = found[0] if found is not None else None
        self._shadows: dict[str, tuple[Callable[..., Any], Any]] = {}

    def take(self) -> None:
        """Begin to make features by row."""
        if self._maker is None:
            return
        for name in METHODS:
            if hasattr(self._maker, name):
                before, shadow = vars(self._maker).get(name), self._shadow(name)
                self._maker.__dict__[name] = shadow
                self._shadows[name] = shadow, before

    def release(self) -> None:
        """Undo `take`."""
        for name, (shadow, before) in self._shadows.items():
            if self._maker is not None and vars(self._maker).get(name) is shadow:
                del self._maker.__dict__[name]
                if before is not None:
                    self._maker.__dict__[name] = before
        self._shadows.clear()

    def _shadow(self, name: str) -> Callable[..., Any]:
        original = getattr(self._maker, name)

        @functools.wraps(original)
        def make(*args: Any, **kwargs: Any) -> Any:
            rows = self._serving()
            return original(*args, **kwargs) if rows is None else self._by_row(name, original, rows, args, kwargs)

        return make

    def _by_row(
        self,
        name: str,
        original: Callable[..., Any],
        rows: ServedRows,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Return what the method returns, with the features of each image by the adapter of its row."""
        assert self._maker is not None
        method = getattr(original, "__func__", getattr(type(self._maker), name))
        tower = getattr(self._maker, TOWER, None)
        once = {} if tower is None else {TOWER: _Once(tower)}
        makers = [each if each is not None and each.has_image_parts else None for each in rows.pooled]
        made = {maker: method(self._alike(maker, once), *args, **kwargs) for maker in dict.fromkeys(makers)}
        first = next(iter(made.values()))
        if len(made) == 1:
            return first
        features = {maker: _features(result, type(self._model).__name__) for maker, result in made.items()}
        owners = self._rows_of_images(name, rows, [len(each) for each in features[makers[0]]])
        chosen = [features[makers[row]][number] for number, row in enumerate(owners)]
        return _replaced(first, chosen)

    def _alike(self, adapter: PooledAdapter | None, modules: Mapping[str, nn.Module]) -> nn.Module:
        """Return the maker of features with an adapter's own parts in it."""
        assert self._maker is not None
        tensors: dict[str, Tensor] = {}
        modules = dict(modules)
        if adapter is not None and adapter.projector is not None and self._projector is not None:
            modules[self._below(self._projector)] = adapter.projector
        if adapter is not None and adapter.newline is not None and self._newline is not None:
            parameter = self._model.get_parameter(self._newline)
            host = self._model.get_submodule(self._newline.rpartition(".")[0])
            tensors[self._below(self._newline)] = placed(adapter.newline, parameter, host)
        return look_alike(self._maker, tensors, modules)

    def _below(self, path: str) -> str:
        """Return a path in the model as one in the maker of features."""
        prefix = next(name for name, module in self._model.named_modules() if module is self._maker)
        return path.removeprefix(f"{prefix}.") if prefix else path

    def _rows_of_images(self, name: str, rows: ServedRows, counts: Sequence[int]) -> list[int]:
        """Return for each image the number of its row among the adapters' rows.

        Args:
            counts: features of each image.
        """
        tokens = [getattr(self._model.config, each, None) for each in METHODS[name]]
        token = next((each for each in tokens if isinstance(each, int)), None)
        if rows.ids is None or token is None:
            raise TokenMapError(
                "images are called for without input_ids, so it is unknown whose they are, and the adapters of this "
                "batch bring projectors of their own. Pass input_ids."
            )
        places = (rows.ids == token).sum(1).tolist()
        times = max(1, len(places) // len(rows.pooled))  # beams repeat each row
        owners, left = [], list(places)
        row = 0
        for count in counts:
            while row < len(left) - 1 and not left[row]:
                row += 1
            owners.append(row // times)
            left[row] -= count
            if left[row] < 0:
                break
        if any(left):
            raise TokenMapError(
                f"the rows of this batch have {places} placeholders, and its images {list(counts)} features: they do "
                "not end together, so it is unknown whose the images are. Have the processor of this model write the "
                "prompts, or give each adapter a batch of its own."
            )
        return owners


class _Once(nn.Module):
    """Runs a vision tower the first time, and gives what that gave from then on."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self._tower, self._given = [tower], None  # in a list: no child, or its hooks and names would be seen twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._given is None:
            self._given = self._tower[0](*args, **kwargs)
        return copy.copy(self._given)  # callers write into it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tower"][0], name)


def refuse_ready_made(kwargs: Mapping[str, Any]) -> None:
    """Refuse features in place of images in a call whose adapters have projectors of their own.

    Raises:
        ArgumentsError: there are some.
    """
    if kwargs.get(READY_MADE):
        raise ArgumentsError(
            f"{READY_MADE} have been through the base's projector, and adapters of this batch bring their own. Pass "
            "the images themselves."
        )


def _features(result: Any, what: str) -> list[Tensor]:
    """Return the features of each image, [features, width] each."""
    found = getattr(result, "pooler_output", result)
    parts = list(found) if isinstance(found, Tensor) and found.dim() == 3 else found
    if not isinstance(parts, list | tuple) or not all(isinstance(each, Tensor) and each.dim() == 2 for each in parts):
        raise TokenMapError(
            f"this {what} does not give the features of each image on its own, so it is unknown whose they are. Give "
            "adapters that bring their own projector a batch of their own, or use transformers 5."
        )
    return list(parts)


def _replaced(result: Any, features: list[Tensor]) -> Any:
    """Return the result of the method with other features in it."""
    found = getattr(result, "pooler_output", result)
    new = torch.stack(features) if isinstance(found, Tensor) else type(found)(features)
    if not hasattr(result, "pooler_output"):
        return new
    result = copy.copy(result)
    result.pooler_output = new
    return result
