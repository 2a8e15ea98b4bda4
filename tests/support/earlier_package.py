"""The package as it was before its modules were moved and its adapters saved anew, taken out of git."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

EARLIER = "9a7b282"  # wrote adapter_config.json, and LLaVA's config in config.json alone


def earlier_package(folder: Path) -> Path:
    """Extract the package of that commit; return the folder to put on the path. Skips where git has no such commit."""
    here = Path(__file__).resolve().parents[2]
    done = subprocess.run(["git", "-C", str(here), "archive", EARLIER, "llava_steering_plugin"], capture_output=True)
    if done.returncode:
        pytest.skip(f"commit {EARLIER} is not to be had here: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        # Only our own files are in it. Python before 3.11.4 knows no filter, and newer ones ask for one.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder
