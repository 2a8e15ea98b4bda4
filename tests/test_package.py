"""The distribution: what importing it costs, what it registers, and what is in the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "llava_steering_plugin"
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


def test_no_requirement_has_an_upper_bound_but_two_whose_newer_versions_would_replace_what_llava_pins() -> None:
    bounded = [line for line in requires("llava-steering-plugin") or [] if "<" in line or "==" in line.split(";")[0]]
    assert {line.partition(";")[0].strip() for line in bounded} == {"sse-starlette<2.2", "openai<3"}


def test_the_extra_all_holds_what_the_other_extras_hold() -> None:
    extras: dict[str, set[str]] = {}
    for line in requires("llava-steering-plugin") or []:
        requirement, _, marker = line.partition(";")
        if "extra" in marker:
            extras.setdefault(marker.split("==")[1].strip(" \"'"), set()).add(requirement.strip())
    every = extras.pop("all")
    extras.pop("vllm", None)  # needs a newer transformers than LLaVA's pin: never in one environment
    assert every == set().union(*extras.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this source, and the wheel that is built of that sdist."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT / PACKAGE, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("llava_steering_plugin-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(sdist)], cwd=folder, check=True, capture_output=True)
    (wheel,) = folder.glob("llava_steering_plugin-*.whl")
    return sdist, wheel


def test_the_sdist_and_the_wheel_of_it_hold_the_typed_package_its_licence_and_entry_points_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    sdist, wheel = built
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / PACKAGE).rglob("*.py")} | {f"{PACKAGE}/py.typed"}
    expected |= {f"{PACKAGE}/diagnostics/report/{name}" for name in ("page.html", "style.css")}
    tasks = (ROOT / PACKAGE / "harness" / "tasks").iterdir()
    expected |= {str(file.relative_to(ROOT)) for file in tasks}

    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= shipped

    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert len(folders) == 2 and PACKAGE in folders
    assert {name for name in names if name.startswith(f"{PACKAGE}/")} == expected
    for ending in ("LICENSE", "entry_points.txt"):
        assert any(name.endswith(ending) for name in names)


ROUND_TRIP = """
import json
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import llava_steering_plugin
from llava_steering_plugin import MoReS, attach, load_adapter, remove, save_adapter, token_map

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
ids, visual = torch.tensor([[1, 5, 9, 7]]), torch.tensor([[False, True, True, False]])

def logits():
    with torch.no_grad(), token_map(visual, torch.ones_like(ids)):
        return model(ids).logits

plain = logits()
for weights in attach(model, MoReS(rank=2, tokens="all")).parameters().values():
    torch.nn.init.normal_(weights)
steered = logits()
save_adapter(model, "adapter")
remove(model)
removed = logits()
load_adapter(model, "adapter")
print(json.dumps({
    "file": llava_steering_plugin.__file__,
    "steers": not torch.equal(steered, plain),
    "removed": torch.equal(removed, plain),
    "loaded": torch.equal(logits(), steered),
}))
"""


def test_the_wheel_installs_and_works_in_an_environment_without_the_source(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", built[1])
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    # Dependencies come from this environment: of a folder that a .pth names no .pth counts, so not that of our source.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    version = built[1].name.split("-")[1]
    assert run(python.with_name("llava-steering"), "--version") == f"llava-steering {version}\n"
    done = json.loads(run(python, "-c", ROUND_TRIP).splitlines()[-1])
    assert Path(done.pop("file")).is_relative_to(packages)
    assert done == {"steers": True, "removed": True, "loaded": True}
