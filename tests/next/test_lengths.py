"""`check-data` and `plan` count the tokens of LLaVA-NeXT's layouts as its own trainer and splice make them.

Covers `components/picture_layouts.py`, `upstream/text/picture_tokens.py` and `upstream/text/tokens.py`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import next_llava
import pytest
import torch
from next_llava import FRAMES, NextLlava

from llava_steering_plugin.components.picture_layouts import grid_of
from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan
from llava_steering_plugin.upstream.text.tokens import TokenCounter
from llava_steering_plugin.upstream.train.targets import clear_first_prompts

GRID = next_llava.GRID
TILED = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": GRID}
MOST = {"image_aspect_ratio": "anyres_max_2", "image_grid_pinpoints": GRID}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
    "padded, with an end": {"image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial_unpad"},
    "tiles, flat": {**TILED, "mm_patch_merge_type": "flat"},
    "tiles": {**TILED, "mm_patch_merge_type": "spatial"},
    "tiles without padding": {**TILED, "mm_patch_merge_type": "spatial_unpad"},
    "tiles alone": {**TILED, "mm_patch_merge_type": "spatial_unpad_nobase"},
    "tiles, pooled": {**TILED, "mm_patch_merge_type": "spatial_maxpool2x2"},
    "few tiles": {**MOST, "mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "one_token"},
    "frames": {**next_llava.ANYRES, "mm_newline_position": "frame", "mm_spatial_pool_mode": "average"},
    "no ends": {**next_llava.ANYRES, "mm_newline_position": "no_token", "mm_spatial_pool_mode": "max"},
}
DEFAULTS = {"mm_newline_position": "grid", "mm_spatial_pool_mode": "bilinear", "image_grid_pinpoints": None}


def counted(made: NextLlava, settings: dict[str, Any], longest: int = 4096) -> TokenCounter:
    folders = {"image_folder": str(made.tiny.images), "video_folder": str(made.videos)}
    flags = {**settings, **folders, "frames_upbound": FRAMES, "force_sample": True}
    return TokenCounter(str(made.qwen), "qwen_1_5", longest, str(made.tiny.tower), None, "mlp2x_gelu", flags)


def trained(made: NextLlava, model: Any, settings: dict[str, Any], longest: int = 4096) -> list[tuple[int, int]]:
    """Return of each sample how many positions LLaVA-NeXT's splice gives it, and how many of them are learned."""
    from llava import conversation
    from llava.train.train import (
        DataCollatorForSupervisedDataset,
        LazySupervisedDataset,
        preprocess,
        preprocess_multimodal,
    )

    for key, value in {**DEFAULTS, **settings}.items():
        setattr(model.config, key, list(map(list, grid_of(value, 56))) if key == "image_grid_pinpoints" else value)
    model.config.tokenizer_model_max_length = longest
    tokenizer = counted(made, settings, longest).tokenizer
    data = SimpleNamespace(
        **{**DEFAULTS, **settings},
        image_folder=str(made.tiny.images),
        video_folder=str(made.videos),
        image_processor=model.get_vision_tower().image_processor,
        is_multimodal=True,
        mm_use_im_start_end=False,
        frames_upbound=FRAMES,
        force_sample=True,
        add_time_instruction=False,
    )
    conversation.default_conversation = conversation.conv_templates["qwen_1_5"]
    found = []
    dataset = LazySupervisedDataset(str(made.data), tokenizer, data)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    for number, sample in enumerate(dataset.list_data_dict):
        item = dataset._get_item(number)
        pictured = "image" in sample or "video" in sample
        sources = [copy.deepcopy(sample["conversations"])]
        if pictured:
            preprocess_multimodal(sources, data)
        # As in a training with a mode, where the marks of the first prompt are not learned.
        made_of = {"input_ids": [item["input_ids"]], "labels": [item["labels"]]}
        clear_first_prompts(made_of, sources, lambda turns, image=pictured: preprocess([turns], tokenizer, image))
        batch = collate([item])
        with torch.no_grad():
            _, _, _, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
                batch["input_ids"],
                None,
                batch["attention_mask"],
                None,
                batch["labels"],
                batch["images"],
                batch["modalities"],
                batch["image_sizes"],
            )
        found.append((embeds.shape[1], int((labels != IGNORED).sum())))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_sample_is_as_long_as_the_splice_makes_it(made: NextLlava, model: Any, name: str) -> None:
    samples = json.loads(made.data.read_text())
    counter = counted(made, LAYOUTS[name])
    lengths = [counter.count(sample) for sample in samples]
    assert all(length is not None for length in lengths)
    assert [length.tokens for length in lengths if length] == [
        tokens for tokens, _ in trained(made, model, LAYOUTS[name])
    ]
    kinds = {"video" if "video" in sample else type(sample.get("image")).__name__ for sample in samples}
    assert kinds == {"str", "list", "video", "NoneType"}


def test_what_is_cut_off_is_not_learned(made: NextLlava, model: Any) -> None:
    settings, samples = LAYOUTS["tiles without padding"], json.loads(made.data.read_text())
    whole = [length for sample in samples if (length := counted(made, settings).count(sample))]
    longest = max(length.tokens for length in whole) - 3
    cut = [length for sample in samples if (length := counted(made, settings, longest).count(sample))]
    assert [length.tokens for length in cut] == [length.tokens for length in whole]
    assert any(0 < short.learned < long.learned for short, long in zip(cut, whole, strict=True))
    learned = [learned for _, learned in trained(made, model, settings, longest)]
    assert [length.learned for length in cut] == learned


def test_a_plan_counts_the_largest_picture_and_the_longest_video(
    made: NextLlava, patched_llava: Path, tmp_path: Path
) -> None:
    def planned(**overrides: object) -> Any:
        flags = next_llava.flags(made, made.qwen, tmp_path / "run", {**next_llava.ANYRES, **overrides})
        return plan(flags, Wanted())

    tiles = planned(frames_upbound=0)
    # 2 x 2 tiles of 4 x 4 tokens behind the whole picture, a token behind each of 8 lines.
    assert tiles.memory is not None and tiles.memory.assumed["of it visual"] == 16 + 8 * 9
    assert any("one picture in 5 tiles, the whole one among them: 88 visual tokens" in note for note in tiles.notes)
    assert any("without --frames_upbound" in note for note in tiles.notes)
    video = planned(frames_upbound=64)
    assert video.memory is not None and video.memory.assumed["of it visual"] == 64 * 2 * 3
    assert any("a video of 64 frames: 384 visual tokens" in note for note in video.notes)
    unknown = planned(image_aspect_ratio="highres")
    assert any(
        "one tile a picture is counted: --image_aspect_ratio highres is not known" in note for note in unknown.notes
    )
