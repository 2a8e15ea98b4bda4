"""A component of another distribution, as docs/adding-a-component.md shows it, is installed and trained with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from tiny_llava import TinyLlava
from training_runs import TRAIN_CODE, subprocess_environment, train_flags

pytest_plugins = ["fork_fixtures"]

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-component.md").read_text(encoding="utf-8")
ENTRY = re.search(r"```ini\n(.*?)```", PAGE, re.DOTALL)
CODE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the page's connector."""
    assert ENTRY is not None and CODE is not None
    source, target = tmp_path_factory.mktemp("llava-first"), tmp_path_factory.mktemp("site")
    head = "[metadata]\nname = llava-first\nversion = 1.0\n[options]\npy_modules = first_tokens\n"
    (source / "setup.cfg").write_text(head + ENTRY[1])
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    )
    (source / "first_tokens.py").write_text(CODE[1])
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True)
    return target


@pytest.mark.slow
def test_a_foreign_connector_trains_and_a_machine_without_it_names_its_package(
    site: Path,
    library_forks: Forks,
    tiny: TinyLlava,
    patched_llava: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llava.model.builder import load_pretrained_model

    from llava_steering_plugin.components.registry import CONNECTORS
    from llava_steering_plugin.errors import ArgumentsError

    output = tmp_path / "llava-first"
    flags: dict[str, object] = {
        "model_name_or_path": tiny.llm,
        "mm_projector_type": "first:count=2",
        "tuning_mode": "mores",
    }
    path = {"PYTHONPATH": f"{patched_llava}:{site}:{':'.join(filter(None, sys.path))}"}

    def train(overrides: dict[str, object]) -> Any:
        words = train_flags(tiny, output, {**flags, **overrides})
        environment = subprocess_environment(patched_llava, path)
        return library_forks.run("-c", TRAIN_CODE, *words, cwd=tmp_path, env=environment)

    done = train({"max_steps": 2})
    assert done.returncode == 0 and "projector" in done.stdout, done.stderr[-4000:]
    config = json.loads((output / "config.json").read_text())
    assert config["mm_projector_type"] == "first:count=2"
    assert config["mm_components"] == {"mm_projector_type": {"name": "first", "package": "llava-first"}}

    with pytest.raises(ArgumentsError, match="connector 'first' of the package 'llava-first': install that package"):
        load_pretrained_model(str(output), None, "llava-first", device="cpu")
    monkeypatch.syspath_prepend(site)
    assert CONNECTORS.package("first") == "llava-first"
    _, model, _, _ = load_pretrained_model(str(output), None, "llava-first", device="cpu")
    assert model.get_model().mm_projector.count == 2
    refused = train({"mm_projector_type": "first:count=17"})
    assert refused.returncode == 2 and "first: the tower gives 16 tokens" in refused.stderr
