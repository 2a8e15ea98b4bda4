"""lmms-eval finds our model by its entry point, which costs a start of it nothing and needs no LLaVA."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

from llava_steering_plugin.harness import manifest

ROOT = Path(__file__).parents[2]


def test_the_entry_point_names_the_manifest() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["lmms_eval.models"].strip().splitlines()
    assert lines == [f"{manifest.MODEL} = llava_steering_plugin.harness.manifest:manifest"]
    assert callable(manifest.manifest)


def test_the_entry_point_imports_neither_torch_nor_llava_nor_the_rest_of_the_package() -> None:
    loaded = "import sys, llava_steering_plugin.harness.manifest; print(*sorted(sys.modules), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = set(done.stdout.split())
    assert not modules & {"torch", "llava", "transformers", "numpy", "lmms_eval"}
    ours = {name for name in modules if name.startswith("llava_steering_plugin.")}
    assert ours == {"llava_steering_plugin.harness", "llava_steering_plugin.harness.manifest"}
