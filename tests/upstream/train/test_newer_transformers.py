"""On LLaVA's pin, what lets its trainer work with a newer transformers changes nothing (`tests/newer` has the rest)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest


@pytest.mark.skipif(not version("transformers").startswith("4.37."), reason="says what holds on LLaVA's pin")
def test_on_the_pin_llavas_trainer_stands_on_transformers_own_and_no_name_is_another(patched_llava: Path) -> None:
    import llava.train.train
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import Trainer, pytorch_utils, trainer

    from llava_steering_plugin.upstream.train.newer_transformers import below_llavas_trainer

    assert below_llavas_trainer() == ()
    parents = llava.train.train.LLaVATrainer.__mro__
    assert parents[parents.index(LLaVATrainer) + 1] is Trainer
    assert trainer.ALL_LAYERNORM_LAYERS is pytorch_utils.ALL_LAYERNORM_LAYERS
