"""A LLaVA with nothing in it: the files that finding and patching look at, importable in milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

UPSTREAM_INIT = b"from .model import LlavaLlamaForCausalLM\n"
MODULE_THAT_TELLS = "import sys\nprint('ran', __name__, sys.argv[1:])\n"


def make_checkout(root: Path, init: bytes = b"loaded = True\n") -> Path:
    """Writes the checkout and returns `root`. Its train.py and model_worker.py print how they were run."""
    package = root / "llava"
    for folder in ("model", "train", "serve"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_bytes(init)
    (package / "model" / "__init__.py").touch()
    (package / "model" / "builder.py").touch()
    (package / "train" / "train.py").write_text("import llava\n" + MODULE_THAT_TELLS)
    (package / "serve" / "model_worker.py").write_text("import llava\n" + MODULE_THAT_TELLS)
    return root


def add_distribution(folder: Path, name: str, version: str, entry_points: str = "", suffix: str = "dist-info") -> Path:
    """Writes the metadata of an installed distribution, as pip leaves it, below `folder`."""
    info = folder / f"{name.replace('-', '_')}-{version}.{suffix}"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / ("METADATA" if suffix == "dist-info" else "PKG-INFO")).write_text(metadata)
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)
    return info


def run_python(*arguments: str, path: list[Path], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python with `path` first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **env}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, timeout=120
    )
