"""Starting one of upstream's programs by `python -m llava_steering_plugin.launch`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training_runs import subprocess_environment

LAUNCH = ["-m", "llava_steering_plugin.launch"]


def launch(
    *words: str,
    llava: Path,
    cwd: Path,
    launcher: Sequence[str] = (sys.executable, *LAUNCH),
    stdin: str = "",
    **env: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *words],
        cwd=cwd,
        env=subprocess_environment(llava, env),
        input=stdin,
        text=True,
        capture_output=True,
        timeout=500,
    )
