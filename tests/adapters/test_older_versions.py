"""Adapters of older versions load here as they did there, and those saved here load in older versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import adapter_answers
import pytest
import torch
from earlier_package import earlier_package
from safetensors.torch import load_file
from steered import contents
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin.adapters.stored.folder import CONFIG, LLAVA_HEADER, OLD_CONFIG
from llava_steering_plugin.adapters.stored.locate import locate, read

pytestmark = pytest.mark.slow

MODES = ("mores", "mixlora")


Loads = list[tuple[str, str]]


@pytest.fixture(scope="module")
def both(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loads]:
    """A folder with adapters of both versions and the older one's answers with them; and how each was loaded."""
    folder = tmp_path_factory.mktemp("versions")
    for mode in MODES:
        adapter_answers.save(str(tiny.llava), mode, str(folder / f"new-{mode}"), seed=1)
    loads = [(str(folder / f"{version}-{mode}"), "") for version in ("old", "new") for mode in MODES]
    # Over a plain language model, upstream rebuilds LLaVA from the adapter's LLaVA config.
    loads += [(str(folder / f"{version}-mores"), str(tiny.llm)) for version in ("old", "new")]
    words = [word for mode in MODES for word in ("--save", mode, str(folder / f"old-{mode}"))]
    words += [word for load in loads for word in ("--load", *load)]
    path = os.pathsep.join([str(patched_llava), str(earlier_package(folder / "package"))])
    done = subprocess.run(
        [sys.executable, adapter_answers.__file__, str(tiny.llava), str(folder / "answers"), *words],
        env=subprocess_environment(patched_llava) | {"PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, loads


def test_the_older_version_wrote_the_older_form(both: tuple[Path, Loads]) -> None:
    folder, _ = both
    for mode in MODES:
        files = contents(folder / f"old-{mode}")
        assert OLD_CONFIG in files and CONFIG not in files
        assert LLAVA_HEADER not in locate(folder / f"old-{mode}").header
        assert read(folder / f"old-{mode}").folder.llava_config == locate(folder / f"new-{mode}").llava_config


def test_adapters_of_both_versions_give_the_same_bits_in_both(both: tuple[Path, Loads]) -> None:
    folder, loads = both
    there = load_file(folder / "answers")
    assert len(there) == len(loads) == 6
    assert not any(torch.equal(there["0"], there[number]) for number in ("1", "2", "3"))
    for number, (adapter, base) in enumerate(loads):
        assert torch.equal(adapter_answers.logits(adapter, base or None), there[str(number)]), adapter
