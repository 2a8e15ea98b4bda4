"""Several trainings by transformers' Trainer in one process that DeepSpeed takes for its only rank, on the CPU.

    trainer_with_deepspeed.py FOLDER

FOLDER holds `zero2.json`, and gets the base and a folder for each training. Run as a script only.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    import deepspeed

    from llava_steering_plugin.training.deepspeed import start_on_cpu

    # On a CPU DeepSpeed compiles an operation for ranks that share memory, which takes minutes. gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    start_on_cpu()
    from chat_bases import BASES
    from steering_trainer import trainer_of

    from llava_steering_plugin.modes.mixlora import MixLoRA
    from llava_steering_plugin.modes.mores import MoReS

    BASES["Llava"](folder / "base")
    settings = str(folder / "zero2.json")
    zero: dict[str, Any] = {"deepspeed": settings, "use_cpu": False}
    mores, mixlora = MoReS(rank=2, dropout=0.2), MixLoRA(factors=8, rank=2, balance=0.3)

    def train(name: str, mode: Any, flags: dict[str, Any], resume: Path | None = None) -> None:
        trainer = trainer_of(folder / "base", folder / name, mode, **flags)
        assert trainer.is_deepspeed_enabled is (name not in ("mores-alone", "mixlora-alone"))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model()
        trainer.save_state()
        del trainer
        gc.collect()  # transformers asks a weak reference to the last run's config whether ZeRO-3 is on

    # First: accelerate leaves DeepSpeed in the environment.
    train("mores-alone", mores, {})
    train("mixlora-alone", mixlora, {})
    train("mores", mores, zero)
    train("mixlora", mixlora, zero)
    train("mores-resumed", mores, zero, folder / "mores" / "checkpoint-3")
    # What `accelerate launch` sets where its config asks for DeepSpeed.
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": settings}
    train("mores-by-accelerate", mores, {"use_cpu": False})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
