"""The tiny LLaVA as LLaVA-NeXT wants it: names with its words, several images and a video in the data, a Qwen.

LLaVA-NeXT knows a language model by a word in its path.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_language_models
from tiny_llava import TinyLlava
from training_runs import train_flags

# A folder of frames, which is read without a video decoder, has this in its name.
VIDEO = "shareVideoGPTV-clip"
FRAMES = 3
GRID = "[[56, 112], [112, 56], [112, 112], [168, 56]]"
# Pictures in tiles, with the line ends between them: the setting of LLaVA-OneVision's scripts.
ANYRES: dict[str, object] = {
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": GRID,
    "mm_patch_merge_type": "spatial_unpad",
}


@dataclass(frozen=True)
class NextLlava:
    """Where the parts are; `tiny` has the pictures and the vision tower.

    Attributes:
        llava: a LLaVA of LLaVA-1.5's kind, without the tower's weights.
        llama, qwen: plain language models.
        data: conversations with one image, two, a video's frames, and none.
        videos: the folder of --video_folder.
    """

    tiny: TinyLlava
    root: Path

    @property
    def llava(self) -> Path:
        return self.root / "llava-llama"

    @property
    def llama(self) -> Path:
        return self.root / "vicuna"

    @property
    def qwen(self) -> Path:
        return self.root / "qwen"

    @property
    def data(self) -> Path:
        return self.root / "mixed.json"

    @property
    def videos(self) -> Path:
        return self.root / "videos"


def build(tiny: TinyLlava, root: Path) -> NextLlava:
    """Write what LLaVA-NeXT needs beside the tiny LLaVA into the new folder `root`."""
    made = NextLlava(tiny, root)
    root.mkdir(parents=True)
    made.llava.symlink_to(tiny.llava)
    made.llama.symlink_to(tiny.llm)
    qwen = next(each for each in tiny_language_models.FAMILIES if each.name == "qwen2")
    # Its preprocessing asks for these two, in this order.
    tiny_language_models.build(replace(qwen, further=("<|im_start|>", "<|im_end|>")), tiny, made.qwen)
    _write_video(made.videos / VIDEO)
    made.data.write_text(json.dumps(_samples(tiny)))
    return made


def flags(made: NextLlava, base: Path, output: Path, overrides: Mapping[str, object] | None = None) -> list[str]:
    """Return the flags of a short training with MoReS over one of the bases."""
    family: dict[str, object] = {"version": "qwen_1_5"} if base == made.qwen else {}
    if base != made.llava:
        family["pretrain_mm_mlp_adapter"] = made.tiny.projector
    given = {
        "model_name_or_path": base,
        "data_path": made.data,
        "video_folder": made.videos,
        "attn_implementation": "eager",
        "tuning_mode": "mores",
        "mores_rank": 2,
        "mores_tokens": "all",
        "group_by_modality_length": None,
        "model_max_length": 1024,
        **family,
        **(overrides or {}),
    }
    return train_flags(made.tiny, output, given)


def _samples(tiny: TinyLlava) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = json.loads(tiny.data.read_text())[:6]
    both = "Which is red? <image>\n<image>\n"
    return [
        *samples,
        {"id": "two", "image": ["00.png", "01.png"], "conversations": _turns(both, "The first.")},
        {"id": "list of one", "image": ["02.png"], "conversations": _turns("<image>\nWhat is it?", "A circle.")},
        {"id": "video", "video": VIDEO, "conversations": _turns("<image>\nWhat moves?", "It is blue.")},
    ]


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _write_video(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    rng = random.Random(5)
    for number in range(FRAMES):
        frame = Image.new("RGB", (80, 48), tuple(rng.randrange(256) for _ in range(3)))
        frame.paste((250, 250, 250), (10 * number, 10, 10 * number + 20, 30))
        frame.save(folder / f"{number:02d}.png")


if __name__ == "__main__":
    import sys

    build(TinyLlava(Path(sys.argv[1])), Path(os.path.abspath(sys.argv[2])))
