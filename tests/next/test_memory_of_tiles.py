"""What `plan` predicts a step over tiles and frames needs is what LLaVA-NeXT's own trainer allocates.

Covers the tiles of `planning/meta_step.py` and `planning/from_flags.py`. All bytes that are alive at a time in a real
step on the CPU are counted, pixels included, as the plan counts those of its own step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import next_llava
import pytest
import torch
from next_llava import VIDEO, NextLlava
from PIL import Image
from torch.utils._pytree import tree_leaves
from training_runs import train_in_process

from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.meta_memory import LiveBytes
from llava_steering_plugin.planning.plan import plan

TOLERANCE = 0.03
SEQUENCE, SIDE, FRAMES = 384, 168, 48
GRID = [[56, 112], [112, 56], [SIDE, SIDE]]
TILES = {**next_llava.ANYRES, "image_grid_pinpoints": str(GRID)}
# Of each: the flags, and what goes through the vision tower for a sample.
SETTINGS: dict[str, tuple[dict[str, object], int]] = {
    "one tile": ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}, 1),
    "tiles": (TILES, 10),
    "tiles, flat": ({**TILES, "mm_patch_merge_type": "flat"}, 10),
    "frames": ({**TILES, "frames_upbound": FRAMES, "force_sample": True}, FRAMES),
}


@pytest.mark.parametrize("projector", ["frozen", "trained"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_needs_what_a_step_does(
    made: NextLlava,
    patched_llava: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    name: str,
    projector: str,
) -> None:
    import transformers

    settings, pictures = SETTINGS[name]
    Image.new("RGB", (SIDE, SIDE), (200, 30, 30)).save(tmp_path / "large.png")
    seen = {"video": VIDEO} if name == "frames" else {"image": "large.png"}
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red " * SEQUENCE}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": str(number), **seen, "conversations": turns} for number in range(2)])
    )
    flags = next_llava.flags(
        made,
        made.llama,
        tmp_path / "run",
        {
            **settings,
            "data_path": tmp_path / "data.json",
            "image_folder": tmp_path,
            "video_folder": made.videos if name == "frames" else None,
            "bf16": False,
            "attn_implementation": "sdpa",
            "model_max_length": SEQUENCE,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": True,
            "freeze_mm_mlp_adapter": projector == "frozen",
            "max_steps": 1,
        },
    )
    memory = plan(flags, Wanted()).memory
    assert memory is not None
    predicted = memory.shardings[memory.chosen]

    peaks, encoded, step = [], [], transformers.Trainer.training_step

    def measured(trainer: Any, model: Any, inputs: Any, *more: Any) -> Any:
        tower = model.get_vision_tower()
        hook = tower.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
        live = LiveBytes([*model.parameters(), *model.buffers()], torch.device("cpu"))
        with live:
            loss = step(trainer, model, inputs, *more)
        hook.remove()
        given = sum(tensor.nbytes for tensor in tree_leaves(inputs["images"]))  # made before the step, and alive in it
        peaks.append(max(live.peaks.values()) + given)
        return loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transformers.Trainer, "training_step", measured)
        train_in_process(flags)
    assert encoded == [2 * pictures]
    (peak,) = peaks
    record_property("counts", f"{name}, projector {projector}: {predicted.activations + predicted.gradients} {peak}")
    assert predicted.activations + predicted.gradients == pytest.approx(peak, rel=TOLERANCE)
