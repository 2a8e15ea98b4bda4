"""A comparison over the tiny LLaVA: its file, and the parts of it that a test changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tiny_llava import TinyLlava

MORES: dict[str, Any] = {"tuning_mode": "mores", "mores_rank": 1, "mores_tokens": "all"}
LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}


def content(tiny: TinyLlava, folder: Path, **changed: Any) -> dict[str, Any]:
    """The content of a comparison's file; `changed` replaces its keys, None takes one away."""
    write_questions(tiny, folder)
    found: dict[str, Any] = {
        "base": str(tiny.llava),
        "output": "output",
        "defaults": {
            "vision_tower": str(tiny.tower),
            "version": "v1",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "freeze_mm_mlp_adapter": True,
            "model_max_length": 512,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "lazy_preprocess": True,
            "use_cpu": True,
        },
        "methods": {"MoReS": MORES, "LoRA": LORA},
        "learning_rates": ["1e-3", 0.01],
        "seeds": [1, 2],
        "answers": {"max_new_tokens": 6, "device": "cpu", "batch_size": 16},
        "tasks": {
            "shapes": {
                "train": str(tiny.data),
                "image_folder": str(tiny.images),
                "validation": {"seen": test_of("validation.jsonl")},
                "test": {"unseen": test_of("test.jsonl")},
            }
        },
    }
    return {key: value for key, value in {**found, **changed}.items() if value is not None}


def test_of(questions: str) -> dict[str, str]:
    """Questions whose lines have answers, scored by exact match."""
    return {"questions": questions, "annotations": questions, "benchmark": "exact_match"}


test_of.__test__ = False  # type: ignore[attr-defined]  # for pytest


def write_file(folder: Path, data: Mapping[str, Any]) -> Path:
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump(dict(data), sort_keys=False))
    return file


def write_questions(tiny: TinyLlava, folder: Path) -> None:
    """validation.jsonl and test.jsonl: the first questions about the tiny world's images, with answers."""
    lines = []
    for sample in json.loads(tiny.data.read_text()):
        if "image" in sample:
            asked, said = (turn["value"] for turn in sample["conversations"][:2])
            text = asked.replace("<image>\n", "")
            line = {"question_id": sample["id"], "image": sample["image"], "text": text, "answer": said}
            lines.append(json.dumps(line) + "\n")
    (folder / "validation.jsonl").write_text("".join(lines[:8]))
    (folder / "test.jsonl").write_text("".join(lines[8:]))
