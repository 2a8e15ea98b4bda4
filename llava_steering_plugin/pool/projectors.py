"""Adapters that bring their own trained projector: every image is projected by the adapter of the row it belongs to.

LLaVA projects all images of a batch in one call of `mm_projector`, before it knows which row takes which. It hands them
out in order: each row takes as many as it has placeholders, and one where it has none. An image may be several tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.adapters.fit.quantised import unquantise
from llava_steering_plugin.adapters.parameters import set_parameters
from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.hooks.look_alike import copied
from llava_steering_plugin.hooks.row_groups import Rows
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.hooks.token_map import nothing_to_splice, signature_of

if TYPE_CHECKING:
    from llava_steering_plugin.pool.adapter import PooledAdapter


def own_projector(projector: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Copy the base's projector and give the copy an adapter's tensors, by their names below it."""
    own = copied(projector)
    unquantise(own, tensors, dtype)
    set_parameters({name: own.get_parameter(name) for name in tensors}, dict(tensors))
    return own.eval().requires_grad_(False)


class ServedRows(Rows):
    """The adapter of each row of a call, and the projector of each tile of its images.

    Attributes:
        pooled: the adapters; one for each row, or one for all.
        ids: the tokens of the present forward, or of the prompts of a generation that begins; None if it has none.
    """

    def __init__(self, adapters: Sequence[PooledAdapter | None]):
        super().__init__(adapters)
        self.pooled = tuple(adapters)
        self.ids: Tensor | None = None
        self._tiles = 0
        self._projected: tuple[tuple[nn.Module, Tensor], ...] = ()

    @property
    def count(self) -> int | None:
        """The number of rows of the call; None where one adapter is named for all of them."""
        return len(self.pooled) if len(self.pooled) > 1 else None

    def named(self, rows: Sequence[int]) -> str:
        """Name the adapters of some rows of the call."""
        own = dict.fromkeys(self.pooled[row if self.count else 0] for row in rows)
        return ", ".join("the base" if each is None else f"the adapter {each.name!r}" for each in own)

    def parts(self) -> list[list[int]]:
        """Return the numbers of the rows, one row for itself; those of an adapter that works at decode steps together.

        Every row has to have its adapter named.
        """
        found: dict[object, list[int]] = {}
        for number, adapter in enumerate(self.pooled):
            found.setdefault(adapter if adapter is not None and adapter.at_decode else number, []).append(number)
        return list(found.values())

    def only(self, numbers: Sequence[int]) -> ServedRows:
        """Return some of the rows, for a prefill of their own; `keep` gives back what it has left."""
        return ServedRows([self.pooled[number] for number in numbers])

    @property
    def brings_projectors(self) -> bool:
        """True if any row's adapter has a projector of its own."""
        return any(adapter is not None and adapter.projector is not None for adapter in self.pooled)

    @property
    def brings_newlines(self) -> bool:
        """True if any row's adapter has an image_newline of its own."""
        return any(adapter is not None and adapter.newline is not None for adapter in self.pooled)

    def note_ids(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the tokens of a call, from its arguments."""
        given = (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None)
        self.ids = next((each for each in given if isinstance(each, Tensor) and not each.is_floating_point()), None)

    def assign_images(self, splice: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Find out from the arguments of LLaVA's splice which tiles belong to which row."""
        from llava.constants import IMAGE_TOKEN_INDEX

        self._projected = ()
        if nothing_to_splice(splice, args, kwargs):
            return
        call = signature_of(splice).bind(*args, **kwargs)
        call.apply_defaults()
        ids, attention, images = (call.arguments.get(name) for name in ("input_ids", "attention_mask", "images"))
        if images is None:
            return
        present = ids == IMAGE_TOKEN_INDEX
        if attention is not None:
            present &= attention.bool()
        tiles = _tiles(images)
        owners: list[PooledAdapter | None] = []
        for row, count in enumerate(present.sum(1).tolist()):
            adapter = self.pooled[row if len(self.pooled) > 1 else 0]
            # A row without a placeholder takes an image too, and none of its features.
            owners += [adapter] * max(1, count)
        # Images that no row takes are projected all the same; by whom does not matter.
        owners = (owners + [None] * len(tiles))[: len(tiles)]
        of_tiles = [owner for owner, count in zip(owners, tiles, strict=True) for _ in range(count)]
        self._tiles = len(of_tiles)
        self._projected = tuple(
            (adapter.projector, torch.tensor([number for number, owner in enumerate(of_tiles) if owner is adapter]))
            for adapter in dict.fromkeys(of_tiles)
            if adapter is not None and adapter.projector is not None
        )

    def project(self, features: Tensor, output: Tensor) -> Tensor:
        """Replace tiles in what the base's projector made of `features` [tiles, patches, width].

        Those are replaced whose adapters have a projector of their own.

        Raises:
            UpstreamError: the projector is not called once for all images, as LLaVA calls it.
        """
        if not self._projected:
            return output
        if features.shape[0] != self._tiles:
            raise UpstreamError(
                f"this LLaVA projects {features.shape[0]} images at once where the batch has {self._tiles}, so it is "
                "unknown whose they are. Serve adapters that bring their own projector alone."
            )
        output = output.clone() if output.requires_grad else output
        for projector, tiles in self._projected:
            mine = features[tiles.to(features.device)].to(next(projector.parameters()).device)
            output.index_copy_(0, tiles.to(output.device), projector(mine).to(output.device))
        return output


def _tiles(images: Any) -> list[int]:
    """Count the tiles of each image of a batch."""
    if isinstance(images, Tensor) and images.dim() < 5:
        return [1] * len(images)
    return [image.shape[0] if image.dim() == 4 else 1 for image in images]


def project_by_row(projector: nn.Module) -> Callable[..., Any]:
    """Return a forward hook for the base's projector."""

    def hook(host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        scope = current()
        # An adapter's own projector is a copy, and may have been copied with this hook.
        if host is not projector or scope is None or not isinstance(scope.rows, ServedRows):
            return None
        return scope.rows.project(args[0], output)

    return hook
