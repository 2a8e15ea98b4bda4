"""Scripts, and the demo, which is a folder that Python runs, are no packages: their modules are imported from there."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS / "demo"), str(SCRIPTS)]
