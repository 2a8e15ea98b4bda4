"""The other homes of a model, whose answers are compared with those of the installed LLaVA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from everywhere import MODES
from safetensors.torch import load_file
from torch import Tensor

from llava_steering_plugin.components.chat_template import chat_template

TOLERANCE = 1e-5  # of the largest logit, in float32
EFFECT = 100  # times that is what an adapter changes at least
ROOT = Path(__file__).parents[2]
ADAPTERS = [f"{mode}{rest}" for mode in MODES for rest in ("", " with projector")]


@dataclass(frozen=True)
class Column:
    """Another home of the same model.

    Attributes:
        python: the interpreter of its environment.
        missing: why it cannot run here; empty if it can.
        path: what comes first on its PYTHONPATH, if anything.
        exported: whether it takes the model as transformers' own class does.
    """

    python: Path
    missing: str
    path: tuple[Path, ...] = ()
    exported: bool = False

    def run(self, model: Path, job: Mapping[str, object], folder: Path) -> dict[str, Tensor]:
        """Return the answers of `everywhere.py` there.

        Args:
            model: its folder.
            job: as that program describes it.
            folder: for the files of both.
        """
        (folder / "job.json").write_text(json.dumps(job))
        out = folder / "answers.safetensors"
        path = [str(each) for each in (*self.path, ROOT, ROOT / "tests/support")]
        done = subprocess.run(
            [self.python, ROOT / "tests/support/everywhere.py", model, folder / "job.json", out],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return load_file(out)


def _environment(name: str, option: str, exported: bool = False) -> Column:
    python = Path(f"{os.environ.get('VENV', ROOT / '.venv')}-{name}/bin/python")
    missing = "" if python.is_file() else f"there is no {python}: scripts/setup.sh {option} makes it"
    return Column(python, missing, exported=exported)


def _main() -> Column:
    """LLaVA's main branch, which runs in the environment of the installed LLaVA."""
    named = os.environ.get("LLAVA_MAIN", "")
    missing = "" if named and (Path(named) / "llava").is_dir() else "LLAVA_MAIN names no checkout of it"
    return Column(Path(sys.executable), missing, (Path(named),))


COLUMNS = {
    "transformers": _environment("transformers", "--transformers", exported=True),
    "main": _main(),
    "next": _environment("next", "--next CHECKOUT"),  # which finds the checkout by itself
}


def of_this_home(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the answers with the adapters that a home has trained, and without any."""
    trained = {key.removeprefix("here: "): value for key, value in found.items() if key.startswith("here: ")}
    return trained | {key: value for key, value in found.items() if key.startswith(("none|", "pixels|"))}


def template() -> str:
    from llava.conversation import conv_templates

    return chat_template(conv_templates["vicuna_v1"])
