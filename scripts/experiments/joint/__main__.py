"""Run `experiments.joint`; scripts/joint.sh sets everything up first."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on the path. Its modules are imported from the package `experiments` instead.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import typer

from experiments.joint.pipeline import main

typer.run(main)
