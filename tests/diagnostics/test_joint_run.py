"""Diagnoses of a joint adapter see the part that they measure, as they see it in an adapter of that part alone.

The other part is made to do nothing, so that every number has to be the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosing import diagnosed, saved_adapter
from steered import load_llava
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin import joint
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

STEERING = MoReS(rank=2, tokens="all", layers="0,2")
ROUTING = MixLoRA(factors=4, rank=2, alpha=1.0, targets="q_proj,down_proj")
OUTER = ("steer_shift", "steer_offset", "routed_b")  # where they are zero, a part is the identity


def with_values_of(part: str) -> Callable[[Attachment], None]:
    """Gives each parameter values by its own name, and lets the other part do nothing."""

    def change(attachment: Attachment) -> None:
        for name, parameter in attachment.parameters().items():
            kind = name.rpartition(".")[2]
            off = kind in OUTER and (part == "steering") != kind.startswith("steer")
            seed = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data.copy_(torch.randn(parameter.shape, generator=seed) * (0 if off else 0.3))

    return change


@pytest.fixture(scope="module")
def adapters(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("adapters"), load_llava(tiny.llava)
    both = joint(STEERING, ROUTING)
    wanted = {
        "mores": (STEERING, "steering"),
        "steering": (both, "steering"),
        "mixlora": (ROUTING, "routing"),
        "routing": (both, "routing"),
    }
    return {
        name: saved_adapter(model, mode, root / name, tiny, with_values_of(part))
        for name, (mode, part) in wanted.items()
    }


@pytest.fixture(scope="module")
def tasks(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = json.loads(tiny.data.read_text())
    chosen = [sample | {"task": "seeing"} for sample in samples if "image" in sample][:2]
    chosen += [sample | {"task": "knowing"} for sample in samples if "image" not in sample][:2]
    file = tmp_path_factory.mktemp("data") / "tasks.json"
    file.write_text(json.dumps(chosen))
    return file


def of_measures(model: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured, without what an adapter is called and is."""
    return {key: value for key, value in model.items() if key not in ("name", "kind", "path", "adapter")}


def test_its_steering_is_measured_as_that_of_mores_alone(
    tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    words = (str(adapters["mores"]), str(adapters["steering"]), "--data", str(tiny.data), "--samples", "2")
    alone, both = diagnosed("steering", tiny, tmp_path, *words)["models"]
    assert (alone["kind"], both["kind"], both["layers"]) == ("mores", "mores+mixlora", [0, 2])
    assert (both["adapter"]["mores_rank"], both["adapter"]["mixlora_rank"]) == (2, 2)
    assert of_measures(both) == of_measures(alone)
    assert both["cost"]["mean"][0] != 0


def test_its_routing_is_measured_as_that_of_mixlora_alone(
    tiny: TinyLlava, adapters: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    words = (str(adapters["mixlora"]), str(adapters["routing"]), "--data", str(tasks), "--repeats", "1")
    alone, both = diagnosed("routing", tiny, tmp_path, *words)["models"]
    assert (alone["kind"], both["kind"]) == ("mixlora", "mores+mixlora")
    assert (both["factors"], both["chosen"], both["selection"]["B"]) == (4, 2, "conditional")
    assert of_measures(both) == of_measures(alone)


def test_interference_is_measured_in_all_of_its_parameters(
    tiny: TinyLlava, adapters: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    words = (str(adapters["steering"]), "--data", str(tasks), "--samples", "1")
    (model,) = diagnosed("interference", tiny, tmp_path, *words)["models"]
    assert model["kind"] == "mores+mixlora"
    assert {"0 q_proj B", "all"} <= set(model["groups"])
    assert [group for group in model["groups"] if group.startswith("0 ") and "proj" not in group], "the steering"


def test_updates_of_an_image_are_those_of_its_steering(
    tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    asked = ["--image", str(tiny.images / "00.png"), "--question", "What is it?", "--answer", "red"]
    updates = []
    for name in ("mores", "steering"):
        command = ["diagnose", "image", str(adapters[name]), *asked, "--effect", "none", "--device", "cpu"]
        result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        updates.append(json.loads((tmp_path / name / "image.json").read_text())["models"][1]["update"])
    assert updates[0] == updates[1] and updates[1]["layers"] == [0, 2]


def test_a_diagnosis_of_another_mode_names_the_one_that_fits_a_part(
    tiny: TinyLlava, adapters: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentsError, match="is a mixlora adapter, and `diagnose steering` is for mores: use"):
        diagnosed("steering", tiny, tmp_path, str(adapters["mixlora"]), "--data", str(tiny.data))
