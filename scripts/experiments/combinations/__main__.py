"""Run `experiments.combinations`; scripts/all_combinations.sh starts it with the Python of .venv."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on the path. Its modules are imported from the package `experiments` instead. The tiny
# models are those of the tests.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import typer

from experiments.combinations.program import main

typer.run(main)
