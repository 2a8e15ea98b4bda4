"""Build the commands that a user would type: upstream's training, evaluation and chat."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.settings import SEED, BaseSettings

NEW_TOKENS = 4  # of the longest answer
BATCH = 32
LAUNCH = [sys.executable, "-m", "llava_steering_plugin.launch"]


# What all trainings share, those of the base and those that are compared.
SHARED: dict[str, object] = {
    "version": "v1",
    # With LLaVA-1.5's two layers, the tuned model still calls more browns of the shifted camera red.
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_cpu": True,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "model_max_length": 512,
    "dataloader_num_workers": 1,
    "lazy_preprocess": True,
}


def train(output: Path, base: Path, data: Path, pictures: Path, tower: Path, flags: dict[str, object]) -> list[str]:
    """Return `llava.train.train` on the CPU in float32; `flags` are added to those that all stages share."""
    shared: dict[str, object] = {
        **SHARED,
        "model_name_or_path": base,
        "data_path": data,
        "image_folder": pictures,
        "vision_tower": tower,
        "output_dir": output,
        "seed": SEED,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 20,
        "report_to": "none",
    }
    given = {**shared, **flags}
    # New weights (the projector) are drawn before upstream sets its own seed.
    return [*LAUNCH, "--seed", str(given["seed"]), "llava.train.train", *_words(given)]


def stage_1(settings: BaseSettings, output: Path, llm: Path, data: Path, tower: Path) -> list[str]:
    """Return the training of the projector alone, on captions."""
    flags: dict[str, object] = {
        "version": "plain",
        "tune_mm_mlp_adapter": True,
        "max_steps": settings.projector_steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": 2e-3,
    }
    return train(output, llm, data / "captions.json", data / "pictures" / "clean", tower, flags)


def stage_2(settings: BaseSettings, output: Path, llm: Path, projector: Path, data: Path, tower: Path) -> list[str]:
    """Return the full tuning of language model and projector, on questions."""
    flags: dict[str, object] = {
        "pretrain_mm_mlp_adapter": projector,
        "max_steps": settings.tuning_steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": 1e-3,
    }
    return train(output, llm, data / "train.json", data / "pictures" / "clean", tower, flags)


def evaluate(answers: Path, model: Path, pictures: Path, questions: Path) -> list[str]:
    """Return upstream's `model_vqa_loader`."""
    flags: dict[str, object] = {
        "model-path": model,
        "image-folder": pictures,
        "question-file": questions,
        "answers-file": answers,
        "conv-mode": "v1",
        "temperature": 0,
        "max_new_tokens": NEW_TOKENS,
    }
    return [*LAUNCH, "--cpu", "llava.eval.model_vqa_loader", *_words(flags)]


def chat(model: Path, picture: Path) -> list[str]:
    """Return upstream's chat on the command line; it reads questions from its standard input."""
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
