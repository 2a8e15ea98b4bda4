"""Upstream's commands, as a user would type them: training, evaluation, chat."""

from __future__ import annotations

import sys
from pathlib import Path

from settings import SEED, Settings, Tuning

LAUNCH = [sys.executable, "-m", "llava_steering_plugin.launch"]


def train(output: Path, base: Path, data: Path, pictures: Path, tower: Path, flags: dict[str, object]) -> list[str]:
    """`llava.train.train` on the CPU in float32; `flags` are added to what all stages share."""
    shared: dict[str, object] = {
        "model_name_or_path": base,
        "data_path": data,
        "image_folder": pictures,
        "vision_tower": tower,
        "version": "v1",
        # With LLaVA-1.5's two layers, trained on the clean camera, more browns of the shifted one are still called red.
        "mm_projector_type": "linear",
        "mm_vision_select_layer": -1,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": output,
        "seed": SEED,
        "use_cpu": True,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "logging_steps": 20,
        "model_max_length": 512,
        "dataloader_num_workers": 1,
        "lazy_preprocess": True,
        "report_to": "none",
    }
    # What is new, a projector or LoRA, is drawn before upstream's own seed counts.
    return [*LAUNCH, "--seed", str(SEED), "llava.train.train", *_words({**shared, **flags})]


def stage_1(settings: Settings, output: Path, llm: Path, data: Path, tower: Path) -> list[str]:
    """The projector alone, on captions."""
    flags: dict[str, object] = {
        "version": "plain",
        "tune_mm_mlp_adapter": True,
        "max_steps": settings.projector_steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": 2e-3,
    }
    return train(output, llm, data / "captions.json", data / "pictures" / "clean", tower, flags)


def stage_2(settings: Settings, output: Path, llm: Path, projector: Path, data: Path, tower: Path) -> list[str]:
    """Full tuning of language model and projector, on questions."""
    flags: dict[str, object] = {
        "pretrain_mm_mlp_adapter": projector,
        "max_steps": settings.tuning_steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": 1e-3,
    }
    return train(output, llm, data / "train.json", data / "pictures" / "clean", tower, flags)


def shift(settings: Settings, tuning: Tuning, output: Path, base: Path, data: Path, tower: Path) -> list[str]:
    """Teaches the shifted camera to the finished base, with the projector frozen."""
    flags: dict[str, object] = {
        "freeze_mm_mlp_adapter": True,
        "max_steps": settings.shift_steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": tuning.learning_rate,
        **tuning.flags,
    }
    return train(output, base, data / "train.json", data / "pictures" / "shifted", tower, flags)


def evaluate(answers: Path, model: Path, base: Path | None, pictures: Path, questions: Path) -> list[str]:
    """Upstream's `model_vqa_loader`; `base` is for what needs to be told (LoRA), not for our adapters."""
    flags: dict[str, object] = {
        "model-path": model,
        "image-folder": pictures,
        "question-file": questions,
        "answers-file": answers,
        "conv-mode": "v1",
        "temperature": 0,
        "max_new_tokens": 4,
    }
    if base is not None:
        flags["model-base"] = base
    return [*LAUNCH, "--cpu", "llava.eval.model_vqa_loader", *_words(flags)]


def chat(model: Path, picture: Path) -> list[str]:
    """Upstream's chat on the command line; it reads questions from its input."""
    flags: dict[str, object] = {
        "model-path": model,
        "image-file": picture,
        "device": "cpu",
        "conv-mode": "v1",
        "temperature": 0,
        "max-new-tokens": 8,
    }
    return [sys.executable, "-m", "llava.serve.cli", *_words(flags)]


def _words(flags: dict[str, object]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
