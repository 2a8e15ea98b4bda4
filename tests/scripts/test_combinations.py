"""scripts/combinations: both stages of three LLaVAs of other parts, planned at full size and run on tiny models.

Covers their command lines, which the plugin's own checks have to pass: flags, templates, names of components.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deepspeed_files import zero
from quick_runs import SCRIPTS
from tiny_language_models import FAMILIES, build
from tiny_llava import TinyLlava
from tiny_towers import TinyTowers
from training_runs import subprocess_environment

from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import Plan, plan

pytest_plugins = ["component_fixtures"]

CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"intermediate_size": 4096, "image_size": 336, "patch_size": 14}
DINOV2 = {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
DINOV2 |= {"image_size": 518, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP |= {"intermediate_size": 4304, "image_size": 384, "patch_size": 14}
RESCALED = {"do_rescale": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PHI = {"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 10240}
PHI |= {"num_attention_heads": 32, "vocab_size": 51200}
QWEN = {"model_type": "qwen2", "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936}
VICUNA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
VICUNA |= {"num_attention_heads": 32, "vocab_size": 32000}


@dataclass(frozen=True)
class Combination:
    """A script, its full-size parts, and what training them has to come to.

    Attributes:
        tower: how --vision_tower is written, with the folder of the parts as {0}.
        connector: parameters of the connector; None: not counted by hand.
        tokens: of an image.
    """

    script: str
    base: dict[str, Any]
    tower: str
    version: str
    connector: int | None
    tokens: int

    @property
    def mores(self) -> int:
        """Parameters of MoReS at rank 1: two vectors and a number for each layer."""
        return self.base["num_hidden_layers"] * (2 * self.base["hidden_size"] + 1)


def mlp(width: int, hidden: int) -> int:
    return (width + 1) * hidden + (hidden + 1) * hidden


COMBINATIONS = (
    Combination("phi2_siglip_mlp", PHI, "siglip:{0}/siglip", "phi", mlp(1152, 2560), 27 * 27),
    Combination("qwen2_5_mof", QWEN, "mof:{0}/clip+{0}/dinov2", "qwen2_5", 2 * mlp(1024, 2048), 2 * 24 * 24),
    Combination("llama_clip_qformer", VICUNA, "{0}/clip", "v1", None, 32),
)
each = pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda combination: combination.script)


def write(folder: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | RESCALED))
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a plan needs of a LLaVA checkout and of full-size parts: settings, no weights."""
    (tmp_path / "scripts").mkdir()
    zero(tmp_path / "scripts", 2)
    square = {"height": 384, "width": 384}
    write(tmp_path / "siglip", SIGLIP, {"image_processor_type": "SiglipImageProcessor", "size": square})
    crop = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
    write(tmp_path / "dinov2", DINOV2, {"image_processor_type": "BitImageProcessor", **crop})
    crop = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}
    write(tmp_path / "clip", CLIP, {"image_processor_type": "CLIPImageProcessor", **crop})
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "llava-steering").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "llava-steering").chmod(0o755)
    return tmp_path


def run(script: str, llava: Path, cwd: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / "combinations" / f"{script}.sh", *words],
        cwd=cwd,
        env=subprocess_environment(llava, {"HOME": str(cwd), **environment}),
        text=True,
        capture_output=True,
        timeout=400,
    )


def words_of(combination: Combination, llava: Path, checkout: Path, *words: str, **environment: str) -> list[str]:
    """What the script gives to the training, or with DRY_RUN to the plan."""
    path = f"{checkout / 'programs'}{os.pathsep}{os.environ['PATH']}"
    asked = {"PATH": path, "LAUNCHER": "printf %s\\n", "GPUS": "8", "TOWER": combination.tower.format(checkout)}
    done = run(combination.script, llava, checkout, *words, **asked, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def planned(combination: Combination, stage: str, llava: Path, checkout: Path, **environment: str) -> Plan:
    base = checkout / "base"
    if not base.exists():
        write(base, combination.base)
    words = words_of(combination, llava, checkout, stage, DRY_RUN="1", MODEL=str(base), **environment)
    assert words[:3] == ["plan", "--gpus", "8"]
    return plan(words[3:], Wanted("A100-80GB", 8))


@pytest.mark.slow
@each
def test_both_stages_pass_our_checks_at_full_size_and_train_what_they_are_to_train(
    checkout: Path, patched_llava: Path, monkeypatch: pytest.MonkeyPatch, combination: Combination
) -> None:
    monkeypatch.chdir(checkout)
    pretrain = planned(combination, "pretrain", patched_llava, checkout)
    finetune = planned(combination, "finetune", patched_llava, checkout)
    assert pretrain.problems == finetune.problems == ()
    assert pretrain.counts is not None and finetune.counts is not None
    assert (pretrain.mode, finetune.mode) == ("projector", "mores")
    assert finetune.counts.mode == combination.mores
    assert pretrain.counts.trainable == finetune.counts.other > 0
    assert combination.connector in (None, finetune.counts.other)
    for made in (pretrain, finetune):
        assert made.memory is not None and made.memory.chosen == "ZeRO-2" and made.memory.fits("ZeRO-2")
        assert made.memory.assumed["of it visual"] == combination.tokens


@each
def test_stage_1_is_llavas_own_and_stage_2_goes_on_from_its_connector(
    checkout: Path, patched_llava: Path, combination: Combination
) -> None:
    stages = {}
    for stage in ("pretrain", "finetune"):
        words = words_of(combination, patched_llava, checkout, stage, "--seed", "7")
        stages[stage] = dict(zip(words[::2], words[1::2], strict=True))
    first, second = stages["pretrain"], stages["finetune"]
    assert (first["--version"], first["--tune_mm_mlp_adapter"]) == ("plain", "True")
    assert "--tuning_mode" not in first and "--pretrain_mm_mlp_adapter" not in first
    assert (second["--version"], second["--tuning_mode"]) == (combination.version, "mores")
    assert second["--pretrain_mm_mlp_adapter"] == f"{first['--output_dir']}/mm_projector.bin"
    shared = ("--model_name_or_path", "--vision_tower", "--mm_projector_type", "--model_max_length", "--seed")
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}
    for given, batch in ((first, 256), (second, 128)):
        assert int(given["--per_device_train_batch_size"]) * int(given["--gradient_accumulation_steps"]) * 8 == batch


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TOWER": "siglib:somewhere"}, "siglip"),
        ({"CONNECTOR": "mof-mlp"}, "mof-mlp"),
        ({"CONNECTOR": "qformer:queries=0"}, "queries"),
    ],
    ids=["misspelled tower", "connector of another tower", "setting out of range"],
)
def test_parts_that_do_not_fit_are_refused_by_the_plan(
    checkout: Path,
    patched_llava: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(checkout)
    phi = COMBINATIONS[0]
    base = write(checkout / "base", phi.base)
    path = f"{checkout / 'programs'}{os.pathsep}{os.environ['PATH']}"
    asked = {"PATH": path, "TOWER": phi.tower.format(checkout), "MODEL": str(base), "DRY_RUN": "1", "GPUS": "8"}
    done = run(phi.script, patched_llava, checkout, "finetune", **asked | environment)
    problems = plan(done.stdout.splitlines()[3:]).problems
    assert problems and message in " ".join(problems)


def test_a_stage_that_is_missing_or_unknown_is_refused_with_both_names(checkout: Path, patched_llava: Path) -> None:
    for words in ((), ("stage1",), ("--seed", "7")):
        done = run("qwen2_5_mof", patched_llava, checkout, *words)
        assert done.returncode == 2 and done.stdout == ""
        assert "give the stage, pretrain or finetune" in done.stderr
        assert not words or f"it is {words[0]}" in done.stderr


@pytest.mark.slow
@each
def test_both_stages_run_to_an_adapter_on_tiny_parts(
    tiny: TinyLlava, towers: TinyTowers, patched_llava: Path, checkout: Path, combination: Combination
) -> None:
    family = {"phi": FAMILIES[0], "qwen2_5": FAMILIES[1]}.get(combination.version)
    asked = {
        "MODEL": str(build(family, tiny, checkout / "llm") if family else tiny.llm),
        "TOWER": {"phi": towers.siglip, "qwen2_5": towers.mof}.get(combination.version, str(tiny.tower)),
        "GPUS": "1",
        "ZERO": "",
        "LAUNCHER": f"{sys.executable} -m llava_steering_plugin.launch --cpu llava.train.train",
        "IMAGES": str(tiny.images),
        "BATCH": "4",
        "GLOBAL_BATCH": "4",
    }
    if combination.connector is None:
        asked["CONNECTOR"] = "qformer:queries=4,layers=2,hidden=32,heads=2"
    flags = ["--max_steps", "2", "--model_max_length", "512", "--tf32", "False", "--use_cpu", "True"]
    flags += ["--dataloader_num_workers", "0"]
    for stage, data in (("pretrain", tiny.captions), ("finetune", tiny.data)):
        done = run(combination.script, patched_llava, checkout, stage, *flags, DATA=str(data), **asked)
        assert done.returncode == 0, done.stderr[-3000:]
    (trained,) = (checkout / "checkpoints").glob("*-mores")
    stored = read(trained)
    assert stored.config.mode == "mores"
    described = stored.config.trained_on
    assert (checkout / "checkpoints" / trained.name.replace("-mores", "-pretrain") / "mm_projector.bin").is_file()
    assert described["bits"] == 16
