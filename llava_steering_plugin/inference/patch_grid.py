"""Tells where the patches of a vision tower lie in an image that LLaVA has padded, cropped, squeezed or cut into tiles.

The grid is that of the tile which shows the whole image: the only one, or the first of anyres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.components.image_tokens import CONNECTOR, of_model
from llava_steering_plugin.components.picture_layouts import ASPECT, MERGE, is_anyres
from llava_steering_plugin.errors import SteeringError

# Left, top, right and bottom, in pixels of the image.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one image, row by row.

    Attributes:
        rows, columns: how many there are.
        box: the part of the image that they cover together; beyond its edges where it is padded.
        first: the number of the first patch among the image's tokens.
        tokens: how many tokens the image has, with those of other tiles.
    """

    rows: int
    columns: int
    box: Box
    first: int
    tokens: int


def patch_grid(size: tuple[int, int], tokens: int, tiles: int, model: Any, processor: Any) -> PatchGrid:
    """Return the grid of an image's patches.

    Args:
        size: width and height of the image.
        tokens: how many tokens it has become.
        tiles: how many tiles; 1 unless it is cut up.
        model: the LLaVA.
        processor: its image processor.

    Raises:
        SteeringError: the tokens are no grid of patches.
    """
    described = of_model(model)
    if described is None or described.side is None:
        raise SteeringError(
            f"an image becomes {tokens} tokens that have no place in it: the connector "
            f"{getattr(model.config, CONNECTOR, None)!r} or the vision tower mixes the image's parts, so they cannot "
            "be shown on the image."
        )
    side, with_class = described.side, described.leading
    if tiles == 1 and tokens != side * side + with_class:
        side, with_class = math.isqrt(tokens), 0  # a projector that pools
    if side * side + with_class > tokens or (tiles == 1 and side * side + with_class != tokens):
        raise SteeringError(
            f"the image becomes {tokens} tokens in {tiles} tile(s), which are no square of patches, so they cannot be "
            "shown on the image."
        )
    aspect, merge = getattr(model.config, ASPECT, None), str(getattr(model.config, MERGE, None) or "flat")
    if tiles > 1 and (not is_anyres(aspect) or "nobase" in merge):
        raise SteeringError(
            f"an image is cut into tiles by {ASPECT} {aspect!r} and joined by {MERGE} {merge!r}: none of them shows "
            "the whole image, or it is not known where it lies, so they cannot be shown on the image."
        )
    return PatchGrid(side, side, _box(size, aspect, processor), with_class, tokens)


def window_numbers(grid: PatchGrid, window: int, size: tuple[int, int], pixels: Tensor, model: Any) -> Tensor:
    """Return which window of the image each pixel shows, int64 [1, 1, H, W], or [1, tiles, 1, H, W] for tiles.

    Windows are squares of `window` x `window` patches, numbered row by row; those at the right and the bottom may be
    smaller. In other tiles, pixels that show no part of the image have the next number.

    Args:
        pixels: as preprocessed, [1, 3, H, W] or [1, tiles, 3, H, W].
        size: width and height of the image.
    """
    height, width = pixels.shape[-2:]
    whole, _ = _numbers(grid, window, (width, height), (0, 0, width, height))
    if pixels.dim() == 4:
        return whole[None, None]
    from llava.mm_utils import get_anyres_image_grid_shape

    columns, rows = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, height)
    # LLaVA shrinks the image until it fits onto all tiles together, and puts it into the middle.
    canvas = columns * width, rows * height
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    wide, high = (min(math.ceil(side * scale), most) for side, most in zip(size, canvas, strict=True))
    numbers, shown = _numbers(grid, window, canvas, ((canvas[0] - wide) // 2, (canvas[1] - high) // 2, wide, high))
    numbers = numbers.masked_fill(~shown, windows_of(grid, window))
    tiles = numbers.view(rows, height, columns, width).transpose(1, 2).reshape(rows * columns, height, width)
    return torch.cat([whole[None], tiles])[None, :, None]


def windows_of(grid: PatchGrid, window: int) -> int:
    """Return how many windows of `window` x `window` patches cover the grid."""
    return math.ceil(grid.rows / window) * math.ceil(grid.columns / window)


def chosen_window(grid: PatchGrid, most: int) -> int:
    """Return the smallest side of windows, in patches, with which the grid has at most `most` of them."""
    sides = range(1, max(grid.rows, grid.columns) + 1)
    return next(side for side in sides if windows_of(grid, side) <= most)


def over_patches(grid: PatchGrid, window: int, values: Tensor) -> Tensor:
    """Return the values of windows at each of their patches, [rows, columns]."""
    across = math.ceil(grid.columns / window)
    down, along = torch.arange(grid.rows) // window, torch.arange(grid.columns) // window
    return values[down[:, None] * across + along[None]]


def _box(size: tuple[int, int], ratio: object, processor: Any) -> Box:
    """Return what part of an image the tile shows: the image as it is, padded to a square, or squeezed into one."""
    width, height = size
    if ratio == "pad":
        side = max(size)
        left, top, right, bottom = _of_processor((side, side), processor)
        x, y = (side - width) // 2, (side - height) // 2
        return left - x, top - y, right - x, bottom - y
    if is_anyres(ratio):
        wanted = processor.size
        side = wanted["shortest_edge"] if isinstance(wanted, dict) else min(wanted)  # LLaVA-NeXT's SigLIP has a tuple
        box = _of_processor((side, side), processor)
        return box[0] * width / side, box[1] * height / side, box[2] * width / side, box[3] * height / side
    return _of_processor(size, processor)


def _of_processor(size: tuple[int, int], processor: Any) -> Box:
    """Return what an image processor of transformers keeps of an image: it shrinks it, then cuts its middle out."""
    width, height = size
    wide, high = width, height
    if getattr(processor, "do_resize", True):
        wanted = processor.size
        if not isinstance(wanted, dict):  # height and width, in some forks
            wanted = dict(zip(("height", "width"), wanted, strict=True))
        if "shortest_edge" in wanted:
            edge, short = wanted["shortest_edge"], min(size)
            wide, high = (edge if side == short else int(edge * side / short) for side in size)
        else:
            wide, high = wanted["width"], wanted["height"]
    left, top, kept = 0, 0, (wide, high)
    if getattr(processor, "do_center_crop", False):
        kept = processor.crop_size["width"], processor.crop_size["height"]
        left, top = (wide - kept[0]) // 2, (high - kept[1]) // 2
    across, down = width / wide, height / high
    return left * across, top * down, (left + kept[0]) * across, (top + kept[1]) * down


def _numbers(
    grid: PatchGrid, window: int, canvas: tuple[int, int], place: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the window that each pixel of a canvas shows, and whether it shows any, int64 and bool [height, width].

    Args:
        canvas: its width and height.
        place: left, top, width and height of the image on it.
    """
    across = math.ceil(grid.columns / window)
    parts, inside = [], []
    for length, start, extent, patches in zip(canvas, place[:2], place[2:], (grid.columns, grid.rows), strict=True):
        places = (torch.arange(length) + 0.5 - start) / extent
        parts.append((places * patches).long().clamp(0, patches - 1) // window)
        inside.append((places > 0) & (places < 1))
    return parts[1][:, None] * across + parts[0][None], inside[1][:, None] & inside[0][None]
