"""Adapters for the tests of upstream's programs: trained through upstream, under names that its rules would misread."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tiny_llava import TinyLlava
from training_runs import plain_llm_overrides, train_flags, train_in_process

# The projector stays the base's: whatever differs from the base's answers is the steering.
STRONG_MORES: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 4,
    "mores_tokens": "all",
    "freeze_mm_mlp_adapter": True,
    "learning_rate": 0.1,
    "max_steps": 6,
}
# What upstream's rules would take for an MPT, for a LoRA, and for a model without a chat template.
MISLEADING_NAMES = ("my-mpt", "mixlora-x", "plain")


@dataclass(frozen=True)
class Served:
    """Folders: one adapter under four names and the base it knows; the base once more; an adapter over a plain LLM."""

    folder: Path

    @property
    def base(self) -> str:
        return str(self.folder / "llava-v1.5-brief")

    @property
    def moved_base(self) -> str:
        """Under a path that no adapter has recorded, and with a name that upstream would not take for a LLaVA."""
        return str(self.folder / "moved" / "base")

    @property
    def adapter(self) -> str:
        return self.named("trained")

    @property
    def over_plain_llm(self) -> str:
        return self.named("over-plain-llm")

    def named(self, name: str) -> str:
        return str(self.folder / name)


def train_adapters(tiny: TinyLlava, folder: Path) -> Served:
    """Trains both adapters through upstream's train() and lays out all folders below `folder`."""
    served = Served(folder)
    _copy_with_brief_answers(tiny.llava, Path(served.base))
    shutil.copytree(served.base, served.moved_base)
    over_llava = STRONG_MORES | {"model_name_or_path": served.base}
    train_in_process(train_flags(tiny, Path(served.adapter), over_llava))
    for name in MISLEADING_NAMES:
        shutil.copytree(served.adapter, served.named(name))
    plain_llm = folder / "vicuna-brief"
    _copy_with_brief_answers(tiny.llm, plain_llm)
    over_llm = STRONG_MORES | plain_llm_overrides(tiny) | {"model_name_or_path": plain_llm}
    train_in_process(train_flags(tiny, Path(served.over_plain_llm), over_llm))
    return served


def _copy_with_brief_answers(source: Path, target: Path) -> None:
    """A copy that ends an answer at every eighth piece of the vocabulary, as models with several end tokens do.

    Random weights hardly ever say </s>, and some of upstream's scripts then go on for 1,024 tokens, without a flag.
    """
    shutil.copytree(source, target)
    file = target / "generation_config.json"
    config = json.loads(file.read_text())
    ends = [config["eos_token_id"], *range(264, 700, 8)]
    file.write_text(json.dumps(config | {"eos_token_id": ends}))
