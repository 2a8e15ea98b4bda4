"""Tuning modes of other distributions are found, used like our own, and named where they are broken.

Covers `registered.py`, too, which does the looking up.
"""

from __future__ import annotations

import configparser
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from tiny_llava import LAYERS, TinyLlava
from training_runs import TRAIN_CODE, subprocess_environment, train_flags

from llava_steering_plugin import registered
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.modes import registry

pytest_plugins = ["fork_fixtures"]

# All that a third party writes.
SETUP = """
[metadata]
name = llava-gain
version = 1.0
[options]
py_modules = llava_gain
[options.entry_points]
llava_steering.modes =
    gain = llava_gain:GainMode
"""
MODE = '''
"""Gain: scales every channel of the visual tokens."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from llava_steering_plugin.modes.base import Mode, setting


class Gain(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(size))

    def forward(self, output, inputs, step):
        return output + (output.float() * self.gain * step.visual[..., None].to(output.device)).to(output.dtype)


@dataclass(frozen=True)
class GainMode(Mode):
    name: ClassVar[str] = "gain"
    first_layer: int = setting(0, "the first layer whose output is scaled")

    def build(self, decoder):
        return {layer.path: Gain(decoder.hidden_size) for layer in decoder.layers[self.first_layer :]}
'''


@pytest.fixture(scope="module")
def gain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the foreign mode."""
    source, target = tmp_path_factory.mktemp("llava-gain"), tmp_path_factory.mktemp("site")
    (source / "setup.cfg").write_text(SETUP)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    )
    (source / "llava_gain.py").write_text(MODE)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture
def gain_here(gain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The foreign mode is installed for this process and for those that it starts."""
    monkeypatch.syspath_prepend(gain)
    monkeypatch.setenv("PYTHONPATH", str(gain), prepend=os.pathsep)
    monkeypatch.delitem(sys.modules, "llava_gain", raising=False)
    return gain


def test_our_own_modes_are_registered_like_anybody_elses() -> None:
    assert "mores" in registry.names()
    assert registry.get("mores").name == "mores"


def test_our_own_modes_are_known_where_the_metadata_are_older_than_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    described = configparser.ConfigParser()
    described.read(Path(__file__).parents[2] / "setup.cfg")
    lines = described["options.entry_points"]["llava_steering.modes"].split("\n")
    monkeypatch.setattr(registered, "entry_points", lambda group: EntryPoints())
    monkeypatch.syspath_prepend("a folder that nothing was read from yet")
    assert registry.names() == sorted(line.partition(" = ")[0] for line in lines if line)
    assert all(registry.get(name).name == name for name in registry.names())


def test_a_foreign_mode_trains_through_upstream_saves_and_loads(
    gain_here: Path, library_forks: Forks, tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    import torch
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from steered import IMAGE, ids_of, pictures, words

    from llava_steering_plugin import disabled

    output = tmp_path / "gained"
    mode = {"tuning_mode": "gain", "gain_first_layer": 1, "freeze_mm_mlp_adapter": True, "learning_rate": 0.3}
    flags = train_flags(tiny, output, mode)
    done = library_forks.run("-c", TRAIN_CODE, *flags, cwd=tmp_path, env=subprocess_environment(patched_llava))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "gain" in done.stdout, "the table of trainable parameters"
    described = json.loads((output / "llava_steering_config.json").read_text())
    assert (described["peft_type"], described["settings"]) == ("LLAVA_GAIN", {"first_layer": 1})

    name = get_model_name_from_path(str(output))
    _, model, _, _ = load_pretrained_model(str(output), None, name, device="cpu")
    parameters = model.llava_steering.parameters()
    assert list(parameters) == [f"layers.{layer}.gain" for layer in range(1, LAYERS)]
    assert all(value.abs().max() > 0 for name, value in parameters.items() if name != f"layers.{LAYERS - 1}.gain")
    asked: dict[str, Any] = {"images": pictures(1).half(), "input_ids": ids_of([1, IMAGE, *words(4)])}
    with torch.inference_mode():
        on = model(**asked).logits
        with disabled(model):
            off = model(**asked).logits
    assert (on - off).abs().max() > 1e-2


def test_a_foreign_modes_flags_are_checked_and_unknown_ones_refused(
    gain_here: Path, library_forks: Forks, tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    mode = {"tuning_mode": "gain", "mores_rank": 2, "gain_frist_layer": 1}
    flags = train_flags(tiny, tmp_path / "out", mode)
    done = library_forks.run("-c", TRAIN_CODE, *flags, cwd=tmp_path, env=subprocess_environment(patched_llava))
    assert done.returncode == 2
    assert "--mores_rank belongs to another mode than gain" in done.stderr
    assert "gain_frist_layer" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_mode_gets_a_suggestion_and_the_list(gain_here: Path) -> None:
    with pytest.raises(
        ArgumentsError, match=r"unknown tuning mode 'gian': did you mean 'gain'\? Registered: gain, .*mores"
    ):
        registry.get("gian")
    with pytest.raises(ArgumentsError, match="unknown tuning mode 'zzz': Registered: "):
        registry.get("zzz")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a distribution whose entry points are `points` and whose module is `code`."""

    def install(name: str, points: str, code: str = "") -> None:
        folder = tmp_path / name
        described = folder / f"{name}-1.0.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text(f"[llava_steering.modes]\n{points}\n")
        (folder / f"{name}_mode.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, f"{name}_mode", raising=False)

    return install


@pytest.mark.parametrize(
    ("points", "code", "reason"),
    [
        ("bad = broken_mode:Bad", "import a_package_that_nobody_has", "cannot be loaded: ModuleNotFoundError"),
        ("bad = broken_mode:Bad", "", "cannot be loaded: AttributeError"),
        ("bad = broken_mode:Bad", "1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("bad = broken_mode:Bad", "def Bad(): pass", "is no subclass of"),
        ("bad = broken_mode:Bad", "class Bad: name = 'bad'", "is no subclass of"),
        ("bad = llava_steering_plugin.modes.mores:MoReS", "", "with name = 'bad'"),
    ],
)
def test_a_broken_foreign_mode_is_named_with_its_distribution(
    installed: Callable[..., None], points: str, code: str, reason: str
) -> None:
    installed("broken", points, code)
    assert "bad" in registry.names(), "listing loads nothing"
    with pytest.raises(SteeringError, match=reason) as error:
        registry.get("bad")
    assert "from broken)" in str(error.value)
    assert registry.get("mores").name == "mores", "the others stay usable"


def test_a_broken_foreign_mode_that_nobody_asked_for_costs_no_more_than_a_warning(
    installed: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    from llava.train.train import TrainingArguments

    from llava_steering_plugin.training.settings.flags import extended

    installed("broken", "bad = broken_mode:Bad", "1 / 0")
    flags = {field.name for field in dataclasses.fields(extended(TrainingArguments.__bases__[0]))}
    assert "mores_rank" in flags
    assert not [flag for flag in flags if flag.startswith("bad_")]
    assert "cannot be loaded: ZeroDivisionError" in caplog.text


def test_two_distributions_that_claim_one_name_are_both_named(installed: Callable[..., None]) -> None:
    installed("first", "twice = first_mode:Mode")
    installed("second", "twice = second_mode:Mode")
    with pytest.raises(SteeringError, match=r"(first.*second)|(second.*first)"):
        registry.get("twice")


def test_packages_are_read_once_and_again_when_a_name_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def counted(*, group: str) -> EntryPoints:
        reads.append(group)
        return entry_points(group=group)

    monkeypatch.setattr(registered, "entry_points", counted)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(3):
        assert registry.get("mores").name in registry.names()
    assert len(reads) == 1, "as long as the path is the same"

    described = tmp_path / "late-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[llava_steering.modes]\nlate = late_mode:Late\n")
    with pytest.raises(SteeringError, match="cannot be loaded: ModuleNotFoundError"):
        registry.get("late")  # pip has installed it while this process runs
    assert "late" in registry.names()
