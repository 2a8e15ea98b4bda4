"""Count the tokens of pictures and videos in LLaVA-NeXT's layouts, from their sizes alone.

LLaVA-NeXT cuts a picture into tiles (`anyres`, `anyres_max_9`), puts these behind the whole picture, takes the padding
out again and ends every line with a token (`spatial_unpad`). Of several pictures in a sample each is padded to one
tile. The frames of a video are pooled to a quarter of their tokens. Where it computes with floats, so does this file:
the same roundings decide about lines.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_steering_plugin.components.base import ImageTokens
from llava_steering_plugin.errors import ArgumentsError

ASPECT, MERGE, GRID = "image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints"
POOL, NEWLINE = "mm_spatial_pool_mode", "mm_newline_position"
FRAMES, FORCE, FASTER = "frames_upbound", "force_sample", "add_faster_video"
# Frames of a folder that LLaVA-NeXT reads without --force_sample.
OF_A_FOLDER = 10
_STRIDE = 2  # by which its splice pools frames, whatever mm_spatial_pool_stride says
ANYRES = "anyres"
_MAX = "anyres_max"  # with the most tiles whose tokens are kept behind it: anyres_max_9
_KNOWN_MERGES = ("flat", "spatial", "spatial_nobase", "spatial_unpad", "spatial_unpad_nobase", "spatial_maxpool2x2")


def is_anyres(aspect: object) -> bool:
    """Return whether an image_aspect_ratio cuts pictures into tiles, by the rule of LLaVA-NeXT's `process_images`.

    LLaVA itself knows "anyres" alone, and crops pictures where another is written: see `upstream/model/image_layouts`.
    """
    return aspect == ANYRES or _MAX in str(aspect)


def most_tiles(aspect: object) -> int | None:
    """Return to the tokens of how many tiles LLaVA-NeXT's splice shrinks a picture; None: to none.

    Only `spatial_unpad` shrinks them.
    """
    found = re.match(rf"{_MAX}_(\d+)", str(aspect))
    return int(found[1]) if found else None


@dataclass(frozen=True)
class PictureLayout:
    """Tells how many tokens LLaVA-NeXT makes of pictures and videos.

    Attributes:
        tile: tokens of a picture of one tile.
        edge: pixels of a tile's side.
        aspect: --image_aspect_ratio; `merge`: --mm_patch_merge_type.
        grid: sizes [width, height] to which pictures are fitted before they are cut into tiles.
        pool: --mm_spatial_pool_mode; `newline`: --mm_newline_position.
        frames: --frames_upbound; `forced`: --force_sample.
        faster: --add_faster_video.
    """

    tile: ImageTokens
    edge: int
    aspect: str = "square"
    merge: str = "flat"
    grid: Sequence[tuple[int, int]] = ()
    pool: str = "bilinear"
    newline: str = "grid"
    frames: int = 0
    forced: bool = False
    faster: bool = False

    @property
    def tiles(self) -> bool:
        """Return whether pictures are cut into tiles."""
        return is_anyres(self.aspect)

    def problems(self) -> list[str]:
        """Return which of these settings are not known here, so that nothing can be counted."""
        found = []
        if self.aspect not in ("square", "pad", ANYRES) and not re.fullmatch(rf"{_MAX}_\d+", self.aspect):
            found.append(f"--{ASPECT} {self.aspect} is not known")
        if self.merge not in _KNOWN_MERGES:
            found.append(f"--{MERGE} {self.merge} is not known")
        if self.tiles and not self.grid:
            found.append(f"--{ASPECT} {self.aspect} needs --{GRID}")
        spatial = self.merge != "flat"
        if (self.tiles and spatial) and self._side is None:
            found.append("the connector does not keep the places of an image's tokens, which tiles are joined by")
        return found

    def video_problems(self) -> list[str]:
        """Return why the tokens of videos cannot be counted."""
        found = []
        if self._side is None:
            found.append("the connector does not keep the places of an image's tokens, by which frames are pooled")
        if self.pool not in ("average", "max", "bilinear"):
            found.append(f"--{POOL} {self.pool} is not known")
        if self.newline not in ("grid", "frame", "one_token", "no_token"):
            found.append(f"--{NEWLINE} {self.newline} is not known")
        if self.faster:
            found.append(f"--{FASTER} ends LLaVA-NeXT's splice (b42941c) with a NameError")
        return found

    @property
    def _side(self) -> int | None:
        """Tokens of a side of a tile; None where they form no square."""
        side = math.isqrt(self.tile.count)
        return side if side * side == self.tile.count and self.tile.side == side else None

    def picture(self, width: int, height: int) -> int:
        """Return the tokens of a sample's only picture of that size in pixels."""
        if not self.tiles:
            return self.one_of_several()
        best = _best_size((width, height), self.grid)
        columns, rows = best[0] // self.edge, best[1] // self.edge
        if self.merge == "flat":
            return self.tile.count * (1 + columns * rows)
        side = self._side
        assert side is not None
        whole = 0 if "nobase" in self.merge else self.tile.count
        high, wide = side * rows, side * columns
        if "maxpool2x2" in self.merge:
            return whole + (high // 2) * (wide // 2)
        if "unpad" not in self.merge:
            return whole + high * wide
        high, wide = _without_padding(high, wide, width, height)
        if limit := most_tiles(self.aspect):
            times = math.sqrt(high * wide / (limit * side**2))
            if times > 1.1:
                high, wide = int(high // times), int(wide // times)
        return whole + high * (wide + 1)

    def one_of_several(self) -> int:
        """Return the tokens of one of a sample's pictures where there are several, or of one that is not cut."""
        return self.tile.count + ("unpad" in self.merge)

    def video(self, frames: int) -> int:
        """Return the tokens of a video of that many frames."""
        side = self._side
        assert side is not None
        pooled = math.ceil(side / _STRIDE) if self.pool == "bilinear" else side // _STRIDE
        tokens = frames * pooled * pooled
        if self.merge == "flat" or self.newline == "no_token":
            return tokens
        if self.newline == "one_token":
            return tokens + ("unpad" in self.merge)
        return tokens + frames * (pooled if self.newline == "grid" else 1)

    def frames_of(self, *, is_folder: bool) -> int | None:
        """Return the most frames that are taken of a video; None if that depends on its length.

        Args:
            is_folder: a folder of pictures, which LLaVA-NeXT knows by its name, and no file.
        """
        if is_folder:
            return self.frames if self.forced else OF_A_FOLDER
        return self.frames or None

    def largest(self) -> tuple[int, int]:
        """Return the most tokens of a picture of any size, and into how many tiles it is cut, the whole included."""
        if not self.tiles:
            return self.one_of_several(), 1
        return (
            max(self.picture(*size) for size in self.grid),
            1 + max((width // self.edge) * (height // self.edge) for width, height in self.grid),
        )


def layout_of(settings: Mapping[str, Any], tile: ImageTokens, edge: int) -> PictureLayout:
    """Return the layout of a LLaVA-NeXT training.

    Args:
        settings: its flags.
        tile: tokens of a picture of one tile.
        edge: pixels of a tile's side.

    Raises:
        ArgumentsError: --image_grid_pinpoints cannot be read.
    """
    return PictureLayout(
        tile,
        edge,
        str(settings.get(ASPECT) or "square"),
        str(settings.get(MERGE) or "flat"),
        grid_of(settings.get(GRID), edge),
        str(settings.get(POOL) or "bilinear"),
        str(settings.get(NEWLINE) or "grid"),
        int(settings.get(FRAMES) or 0),
        bool(settings.get(FORCE)),
        bool(settings.get(FASTER)),
    )


def grid_of(text: Any, edge: int) -> tuple[tuple[int, int], ...]:
    """Return the sizes that --image_grid_pinpoints names: a list of them, or "(1x1),...,(6x6)", counted in tiles.

    Raises:
        ArgumentsError: it is neither.
    """
    if not text:
        return ()
    if isinstance(text, str) and "x" in text:
        found = [(int(width), int(height)) for width, height in re.findall(r"\((\d+)x(\d+)\)", text)]
        if found:
            first, last = found[0], found[-1]
            columns, rows = range(first[0], last[0] + 1), range(first[1], last[1] + 1)
            return tuple((width * edge, height * edge) for width in columns for height in rows)
    else:
        try:
            listed = ast.literal_eval(text) if isinstance(text, str) else text
            sizes = tuple((int(width), int(height)) for width, height in listed)
            if all(width >= edge and height >= edge for width, height in sizes):
                return sizes
        except (ValueError, SyntaxError, TypeError):
            pass
    raise ArgumentsError(
        f"--{GRID} {text}: give a list of sizes in pixels, none below a tile's {edge}, such as [[{edge}, {2 * edge}], "
        f"[{2 * edge}, {edge}]], or a range of tiles, such as (1x1),...,(6x6)"
    )


def _best_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size in the grid that keeps most of a picture's pixels, and of those the one that wastes least."""
    width, height = size
    best, kept, wasted = sizes[0], 0, math.inf
    for wide, high in sizes:
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        if effective > kept or (effective == kept and wide * high - effective < wasted):
            best, kept, wasted = (wide, high), effective, wide * high - effective
    return best


def _without_padding(rows: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Return rows and columns of a picture's tokens after those are gone that show padding alone."""
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(width * (rows / height))) // 2
    return rows, columns - 2 * padding
