"""Build the tiny random models that are combined, and write LLaVA's flags for a combination.

The models are those of the tests (tests/support).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.combinations.cells import NEWER, Cell

# Learned quickly, so that nothing stays where it began; with a checkpoint after each of two steps.
STEPS: dict[str, object] = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
    "warmup_ratio": 0,
}
METHOD_FLAGS: dict[str, dict[str, object]] = {
    "mores": {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all", "mores_dropout": 0.1},
    "mixlora": {"tuning_mode": "mixlora", "mixlora_factors": 4, "mixlora_rank": 2},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 2e-4},
}
# Sizes that suit tiny models; the others stand as they are.
CONNECTOR_SETTINGS = {
    "qformer": "qformer:queries=5,layers=2,hidden=32,heads=2",
    "resampler": "resampler:queries=6,layers=1,heads=2,head_width=8",
}
# EfficientNet gives 7 x 7 tokens, which the default factor of 2 does not divide.
SEVENTHS = ("avgpool", "pixel-shuffle")


@dataclass(frozen=True)
class Base:
    """A plain language model on disk, the conversation template that suits it, and the value of --language_model."""

    folder: Path
    version: str
    named: str | None = None


@dataclass(frozen=True)
class Parts:
    """Tiny models: language models and values of --vision_tower by name, and the data to train on."""

    bases: Mapping[str, Base]
    towers: Mapping[str, str]
    tiny: object  # tiny_llava.TinyLlava

    def flags(self, cell: Cell, output: Path) -> list[str]:
        """Return LLaVA's flags for training a combination into a folder."""
        from training_runs import train_flags

        base = self.bases[cell.language_model]
        flags: dict[str, object] = {
            "model_name_or_path": base.folder,
            "version": base.version,
            "language_model": base.named,
            "vision_tower": self.towers[cell.tower],
            "mm_projector_type": connector_flag(cell),
            **STEPS,
            **METHOD_FLAGS[cell.method],
        }
        if cell.tower == "efficientnet-lite0":
            flags["mm_vision_select_layer"] = -1  # it has its last layer alone
        made: list[str] = train_flags(self.tiny, output, flags)
        return made


def connector_flag(cell: Cell) -> str:
    """Return the value of --mm_projector_type."""
    if cell.tower == "efficientnet-lite0" and cell.connector in SEVENTHS:
        return f"{cell.connector}:factor=7"
    return CONNECTOR_SETTINGS.get(cell.connector, cell.connector)


def find_timm() -> None:
    """Put the folder in which scripts/setup.sh keeps timm on the path, unless timm is installed."""
    apart = Path(sys.prefix) / "towers"
    if importlib.util.find_spec("timm") is None and apart.is_dir():
        sys.path.append(str(apart))


def build_parts(root: Path) -> Parts:
    """Write all models below `root`, which is emptied first: the same bytes every time."""
    import tiny_language_models
    import tiny_llava
    import tiny_towers

    from llava_steering_plugin.components.registry import LANGUAGE_MODELS

    shutil.rmtree(root, ignore_errors=True)
    tiny = tiny_llava.build(root / "llava")
    bases = {"llama": Base(tiny.llm, "v1")}
    for family in tiny_language_models.FAMILIES:
        named = family.name if family.name in ("smollm2", "mistral") else None
        bases[family.name] = Base(
            tiny_language_models.build(family, tiny, root / family.name), str(family.version), named
        )
    for name in NEWER:  # nothing can be built of them here: that they are refused is what is tried
        folder = root / name
        folder.mkdir()
        described = {"model_type": LANGUAGE_MODELS.get(name).model_type, "hidden_size": tiny_llava.HIDDEN}
        (folder / "config.json").write_text(json.dumps(described))
        bases[name] = Base(folder, "tokenizer")
    built = tiny_towers.build_towers(root / "towers", tiny)
    towers = {
        "clip": str(tiny.tower),
        "siglip": built.siglip,
        "dinov2": built.dinov2,
        "mof": built.mof,
        "timm": tiny_towers.build_timm(root / "towers" / "vit"),
        "efficientnet-lite0": "efficientnet-lite0",
    }
    return Parts(bases, towers, tiny)
