"""One GPU for a process that trains: transformers takes all that are visible, and a tuning mode refuses several."""

from __future__ import annotations

import os

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def first_card() -> dict[str, str]:
    """The environment of a child process that sees the first of the cards that are visible here."""
    if not torch.cuda.is_available():
        return dict(os.environ)
    return {**os.environ, VISIBLE: os.environ.get(VISIBLE, "0").split(",")[0].strip()}
