"""Run `papers`; scripts/eval_papers.sh starts it with the Python of .venv."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on the path. Its modules are imported from the package `papers` instead.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from papers.program import main

app = typer.Typer(add_completion=False)
app.command()(main)
app(prog_name="scripts/eval_papers.sh")
