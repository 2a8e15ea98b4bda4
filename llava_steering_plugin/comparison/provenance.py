"""Say by what a result was made: versions of packages, and the state of the package's checkout."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_steering_plugin import __version__

PACKAGES = ("llava", "llava-torch", "torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Holds versions by package, and `commit` and `dirty` of a checkout; no checkout has no git state."""

    versions: dict[str, Any]
    git: dict[str, Any]


def provenance() -> Provenance:
    """Return what this comparison is made by."""
    versions: dict[str, Any] = {"llava-steering-plugin": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Provenance(versions, _git(Path(__file__).parents[2]))


def now() -> str:
    """Return the time in UTC, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git(folder: Path) -> dict[str, Any]:
    if not (folder / ".git").exists():  # a folder above may be somebody else's checkout
        return {}
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}
