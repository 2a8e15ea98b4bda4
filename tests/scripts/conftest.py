"""The demo is a folder that Python runs, not a package: its modules are imported from there."""

from __future__ import annotations

import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
sys.path.insert(0, str(DEMO))
