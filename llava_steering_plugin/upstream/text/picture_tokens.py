"""Count the tokens of a sample's pictures or video as LLaVA-NeXT lays them out, from the headers of their files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_steering_plugin.components.picture_layouts import PictureLayout
from llava_steering_plugin.errors import ArgumentsError, listing
from llava_steering_plugin.training.data.pictured import IMAGE, images_of

# A video whose path holds this is a folder of frames.
_FRAMES = "shareVideoGPTV"


@dataclass(frozen=True)
class PictureTokens:
    """Counts the tokens of one sample after the other.

    Attributes:
        image_folder: of --image_folder; None: pictures that are cut into tiles count as the largest do.
        video_folder: of --video_folder.
    """

    layout: PictureLayout
    image_folder: str | None = None
    video_folder: str | None = None

    def check(self) -> None:
        """Refuse settings whose tokens are not known here.

        Raises:
            ArgumentsError: with all of them.
        """
        problems = self.layout.problems() + (self.layout.video_problems() if self.video_folder else [])
        if problems:
            raise ArgumentsError(
                listing(
                    "tokens cannot be counted; without --model_name_or_path the samples alone are checked", problems
                )
            )

    def notes(self) -> list[str]:
        """Return what is assumed."""
        found = []
        if self.layout.tiles and self.image_folder is None:
            found.append("every picture counts as one that fills the largest tiles: give --image-folder")
        if self.video_folder and not self.layout.frames:
            found.append("videos in files are not counted: without --frames_upbound, their length says how many frames")
        elif self.video_folder and not self.layout.forced:
            found.append(f"a video in a file counts as {self.layout.frames} frames; a short one may have fewer")
        return found

    def of(self, sample: Mapping[str, Any]) -> list[int] | None:
        """Return the tokens for each `<image>` of a sound sample with pictures or a video; None: not known.

        Raises:
            OSError: a picture cannot be opened.
        """
        if IMAGE in sample:
            names, _ = images_of(sample, several=True)
            return [self.layout.one_of_several()] * len(names) if len(names) > 1 else [self._picture(names[0])]
        path = os.path.join(self.video_folder or "", str(sample["video"]))
        frames = self.layout.frames_of(is_folder=_FRAMES in path)
        return None if frames is None else [self.layout.video(frames)]

    def _picture(self, name: str) -> int:
        if not self.layout.tiles:
            return self.layout.one_of_several()
        if self.image_folder is None:
            return self.layout.largest()[0]
        from PIL import Image

        with Image.open(os.path.join(self.image_folder, name)) as file:
            return self.layout.picture(*file.size)
