"""Let LLaVA's trainer work with a newer transformers than its pin; on the pin, nothing here changes anything."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


def on_trainer_import(module: ModuleType) -> None:
    """Give `transformers.trainer` a name back that LLaVA's trainer imports from there: it went with 4.53.

    It lies where it always was, in `transformers.pytorch_utils`.
    """
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

    module.__dict__.setdefault("ALL_LAYERNORM_LAYERS", ALL_LAYERNORM_LAYERS)


def below_llavas_trainer() -> tuple[type, ...]:
    """Return what a trainer of LLaVA's needs among its bases with the transformers that is installed.

    transformers' trainer is imported here alone: its import calls `on_trainer_import`, which must be there by then.
    """
    from transformers.trainer import Trainer

    if "metrics" in inspect.signature(Trainer._save_checkpoint).parameters:
        return ()

    class WithoutMetrics(Trainer):
        """Comes behind LLaVA's trainer in the bases of a new class, and so between it and transformers' own.

        LLaVA hands `metrics` on to `_save_checkpoint`, which takes none from 4.47 on: it finds the best checkpoint
        itself.
        """

        def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
            super()._save_checkpoint(model, trial)

    return (WithoutMetrics,)
