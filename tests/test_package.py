"""The distribution: what importing it costs, what it registers, and what is in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = "{'torch', 'transformers', 'deepspeed', 'llava', 'matplotlib'}"


@pytest.mark.parametrize(
    "module",
    [
        "llava_steering_plugin",
        "llava_steering_plugin.errors",
        "llava_steering_plugin.cli",
        "llava_steering_plugin.upstream.cuda_to_cpu",
        "llava_steering_plugin.launch",
        "llava_steering_plugin.upstream.install",
        "llava_steering_plugin.checkout.patch",
    ],
)
def test_importing_it_imports_no_torch(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("llava.plugins", "steering", "llava_steering_plugin.upstream.install:install"),
        ("llava_steering.modes", "mores", "llava_steering_plugin.modes.mores:MoReS"),
        ("console_scripts", "llava-steering", "llava_steering_plugin.cli:main"),
    ],
)
def test_its_entry_points_are_registered_and_load(group: str, name: str, value: str) -> None:
    (found,) = entry_points(group=group, name=name)
    assert found.value == value
    assert callable(found.load())


def test_no_requirement_has_an_upper_bound() -> None:
    bounded = [line for line in requires("llava-steering-plugin") or [] if "<" in line or "==" in line.split(";")[0]]
    assert bounded == []


def test_the_extra_all_holds_what_the_other_extras_hold() -> None:
    extras: dict[str, set[str]] = {}
    for line in requires("llava-steering-plugin") or []:
        requirement, _, marker = line.partition(";")
        if "extra" in marker:
            extras.setdefault(marker.split("==")[1].strip(" \"'"), set()).add(requirement.strip())
    every = extras.pop("all")
    assert every == set().union(*extras.values())


def test_the_wheel_holds_the_typed_package_its_licence_and_entry_points_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "llava_steering_plugin", source / "llava_steering_plugin")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("llava_steering_plugin-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert len(folders) == 2 and "llava_steering_plugin" in folders
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "llava_steering_plugin").rglob("*.py")}
    assert expected <= set(names)
    assert "llava_steering_plugin/py.typed" in names
    for ending in ("LICENSE", "entry_points.txt"):
        assert any(name.endswith(ending) for name in names)
