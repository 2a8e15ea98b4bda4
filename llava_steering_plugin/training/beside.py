"""Run a model beside its training, so that the training does not notice: to validate, and to measure."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# LLaVA's method that puts images between texts, and moves the labels along.
SPLICE = "prepare_inputs_labels_for_multimodal"


def model_to_evaluate(trainer: Any) -> Any:
    """Return the model of a trainer as its training calls it: DeepSpeed's engine, DDP's wrapper, or the model."""
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        return trainer.deepspeed
    if not trainer.accelerator._models:  # no training has prepared it
        return trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
    return trainer.model


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the states of all random generators back at the end: a training must not notice a validation."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout, and all that is for training only, off for the block."""
    training = model.training
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            # On some processors their evaluation packs the weights for good, and training could not go on.
            module.training = training
    try:
        yield model
    finally:
        model.train(training)


@contextmanager
def splices_heard(model: Any, hear: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    """Hand `hear` what LLaVA's splice returns, for each call of it in the block; nothing if the model is no LLaVA."""
    if not hasattr(model, SPLICE):
        yield
        return
    splice = getattr(model, SPLICE)

    def listening(*args: Any, **kwargs: Any) -> Any:
        result = splice(*args, **kwargs)
        hear(result)
        return result

    shadowed = model.__dict__.get(SPLICE)
    model.__dict__[SPLICE] = listening
    try:
        yield
    finally:
        if shadowed is None:
            del model.__dict__[SPLICE]
        else:
            model.__dict__[SPLICE] = shadowed


@contextmanager
def spliced_labels(model: Any) -> Iterator[list[Tensor]]:
    """Collect the labels as LLaVA moves them when it inserts images, for the block."""
    found: list[Tensor] = []

    def hear(result: tuple[Any, ...]) -> None:
        if result[5] is not None:
            found.append(result[5])

    with splices_heard(model, hear):
        yield found
