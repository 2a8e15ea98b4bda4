"""Tokens of LLaVA-NeXT's layouts where that is not installed: numbers of its papers, and settings that are not known.

That they are what its own code makes: tests/next/test_lengths.py.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from llava_steering_plugin.components.base import ImageTokens
from llava_steering_plugin.components.picture_layouts import PictureLayout, grid_of, is_anyres, layout_of
from llava_steering_plugin.errors import ArgumentsError

PACKAGE = Path(__file__).parents[2] / "llava_steering_plugin"

CLIP = ImageTokens(576, 1024, 24)
SIGLIP = ImageTokens(729, 1152, 27)
SIX = ", ".join(f"({width}x{height})" for width in range(1, 7) for height in range(1, 7))


def test_a_square_picture_of_llava_1_6_has_2880_tokens_and_the_ends_of_48_lines() -> None:
    grid = grid_of("[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]", 336)
    layout = PictureLayout(CLIP, 336, "anyres", "spatial_unpad", grid)
    assert layout.picture(672, 672) == 5 * 576 + 48
    assert layout.largest() == (5 * 576 + 48, 5)
    assert layout.picture(1000, 500) == 576 + 24 * 49
    assert layout.one_of_several() == 577


def test_onevisions_limit_of_nine_tiles_holds_for_all_sizes_of_its_grid() -> None:
    layout = layout_of(
        {"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": SIX},
        SIGLIP,
        384,
    )
    assert len(layout.grid) == 36 and (2304, 384) in layout.grid
    tokens, tiles = layout.largest()
    assert tiles == 37 and 9 * 729 + 729 < tokens < 1.21 * 9 * 729 + 729 + 200
    assert layout.picture(2304, 2304) == 729 + 81 * 82


def test_frames_of_a_video_have_a_quarter_of_the_tokens() -> None:
    layout = PictureLayout(SIGLIP, 384, "anyres_max_9", "spatial_unpad", ((384, 768),), frames=32, forced=True)
    assert layout.video(32) == 32 * 14 * 15
    assert PictureLayout(SIGLIP, 384, pool="average").video(32) == 32 * 13 * 13
    assert (layout.frames_of(is_folder=True), layout.frames_of(is_folder=False)) == (32, 32)
    free = PictureLayout(SIGLIP, 384)
    assert (free.frames_of(is_folder=True), free.frames_of(is_folder=False)) == (10, None)


def test_what_is_not_known_is_said() -> None:
    layout = PictureLayout(ImageTokens(32, 768), 336, "highres", "spatial_s2", pool="sum", newline="x", faster=True)
    said = " ".join(layout.problems() + layout.video_problems())
    for text in ("highres is not known", "spatial_s2 is", "sum is not", "--mm_newline_position x", "add_faster_video"):
        assert text in said
    tiles = PictureLayout(ImageTokens(32, 768), 336, "anyres", "spatial_unpad")
    assert len(tiles.problems()) == 2  # no grid, and tokens without places
    assert tiles.video_problems()


@pytest.mark.parametrize("text", ["336", "[[336]]", "[[100, 336]]", "nothing"])
def test_a_grid_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ArgumentsError, match=r"give a list of sizes in pixels, none below a tile's 336"):
        grid_of(text, 336)


def test_every_name_that_llava_next_cuts_into_tiles_by_is_known_and_no_other() -> None:
    for aspect in ("anyres", "anyres_max_9", "anyres_max_4", "anyres_max"):
        assert is_anyres(aspect)
    for aspect in (None, "square", "pad", "highres", "crop_split", "anyres_9", ""):
        assert not is_anyres(aspect)


def test_one_file_says_which_names_these_are() -> None:
    """Whoever compares with "anyres" alone forgets LLaVA-NeXT's anyres_max_9."""
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"anyres(_max)?(_.*)?", node.value)
    }
    assert found == {"components/picture_layouts.py"}
