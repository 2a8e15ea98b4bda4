"""scripts/finetune_*.sh: the papers' settings, planned at full size and run to the end on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from official_sources import make_source
from quick_runs import SCRIPTS
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin.adapters.stored.folder import EXTRA
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan

NAMES = ("mores", "mixlora", "mores_4bit", "task_mores")
SIZES = {"7b": (4096, 32, 11008), "13b": (5120, 40, 13824)}
# Of a linear, MixLoRA trains E (in + out) factors and E (2 + r) in of its routers, with E = 16 and r = 4.
PARAMETERS = {"mores": {"7b": 262_176, "13b": 409_640}, "mixlora": {"7b": 149_291_008, "13b": 233_635_840}}
TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
ZERO_2 = {
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"},
}


def run(name: str, llava: Path, cwd: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    variables = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(cwd), **environment}
    return subprocess.run(
        [SCRIPTS / f"finetune_{name}.sh", *flags],
        cwd=cwd,
        env=subprocess_environment(llava, variables),
        text=True,
        capture_output=True,
        timeout=400,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what a dry run needs of a LLaVA checkout: DeepSpeed's file and two config.json, no weights."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "zero2.json").write_text(json.dumps(ZERO_2))
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps(TOWER | {"intermediate_size": 4096, "image_size": 336, "patch_size": 14})
    )
    return tmp_path


def write_base(folder: Path, size: str, llava: bool) -> Path:
    width, layers, inner = SIZES[size]
    config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    config |= {"num_attention_heads": width // 128, "vocab_size": 32000}
    if llava:
        config |= {"model_type": "llava_llama", "mm_vision_tower": str(folder / "tower"), "mm_hidden_size": 1024}
        config |= {"mm_projector_type": "mlp2x_gelu"}
    base = folder / f"base-{size}"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    return base


def flags_of(name: str, llava: Path, cwd: Path, *flags: str, **environment: str) -> list[str]:
    """What the script gives the training, from a launcher that only shows it."""
    done = run(name, llava, cwd, *flags, LAUNCHER="printf %s\\n", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_at_full_size_the_flags_are_right_and_the_plan_has_the_papers_numbers(
    checkout: Path, patched_llava: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: str
) -> None:
    base = write_base(checkout, size, llava=name == "task_mores")
    asked = {"MODEL": str(base), "TOWER": str(checkout / "tower"), "SIZE": size, "GPUS": "8", "BATCH": "4"}
    monkeypatch.chdir(checkout)

    made = plan(flags_of(name, patched_llava, checkout, **asked), Wanted("A100-80GB", 8))

    assert not made.problems and not made.notes
    assert made.counts is not None and made.counts.mode == PARAMETERS["mixlora" if name == "mixlora" else "mores"][size]
    assert (made.counts.other == 0) == (name == "task_mores")
    assert made.memory is not None and made.memory.chosen == "ZeRO-2" and made.memory.fits("ZeRO-2")
    assert made.memory.assumed["bits"] == (4 if name == "mores_4bit" else 16)


@pytest.mark.slow
def test_a_dry_run_shows_that_plan_and_trains_nothing(checkout: Path, patched_llava: Path) -> None:
    asked = {"MODEL": str(write_base(checkout, "7b", llava=False)), "TOWER": str(checkout / "tower"), "GPUS": "8"}

    done = run("mores", patched_llava, checkout, "--json", DRY_RUN="1", GPU="A100-80GB", **asked)

    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert made["parameters"]["mode"] == PARAMETERS["mores"]["7b"] and made["memory"]["per_gpu"]["ZeRO-2"]["fits"]
    assert made["memory"]["assumed"]["GPUs"] == 8
    assert not (checkout / "checkpoints").exists()


def test_batches_that_do_not_make_up_the_global_one_are_refused_before_anything_starts(
    checkout: Path, patched_llava: Path
) -> None:
    done = run("mores", patched_llava, checkout, GPUS="3")
    assert done.returncode == 2
    assert "GLOBAL_BATCH 128 cannot be cut into batches of 16 on 3 GPU(s)" in done.stderr
    assert "SIZE is 70b" in run("mores", patched_llava, checkout, SIZE="70b").stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GPUS": "4"}, ["--num_gpus", "4"]),
        ({"CUDA_VISIBLE_DEVICES": "5,7"}, ["--include", "localhost:5,7"]),
        ({"CUDA_VISIBLE_DEVICES": "5,7,3", "GPUS": "2"}, ["--include", "localhost:5,7"]),
    ],
    ids=["all visible", "two of them", "the first two of three"],
)
def test_deepspeed_starts_on_the_cards_that_are_visible(
    checkout: Path, patched_llava: Path, environment: dict[str, str], expected: list[str]
) -> None:
    programs = checkout / "programs"
    programs.mkdir()
    (programs / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "deepspeed").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = run("mores", patched_llava, checkout, PATH=path, **environment)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:5] == [*expected, "--module", "llava_steering_plugin.launch", "llava.train.train_mem"]
    given = dict(zip(words[5::2], words[6::2], strict=True))
    cards = int(environment.get("GPUS", "2"))
    assert int(given["--per_device_train_batch_size"]) * int(given["--gradient_accumulation_steps"]) * cards == 128


def test_cards_that_deepspeed_cannot_be_told_of_are_refused_with_what_works(
    checkout: Path, patched_llava: Path
) -> None:
    done = run("mores", patched_llava, checkout, CUDA_VISIBLE_DEVICES="GPU-8932f937,GPU-1a2b")
    assert done.returncode == 2
    assert "torchrun --nproc_per_node 2 -m llava_steering_plugin.launch llava.train.train_mem" in done.stderr
    done = run("mores", patched_llava, checkout, CUDA_VISIBLE_DEVICES="0", GPUS="2")
    assert done.returncode == 2
    assert "GPUS is 2 and CUDA_VISIBLE_DEVICES is 0" in done.stderr


def test_the_papers_hyper_parameters_are_what_training_gets(checkout: Path, patched_llava: Path) -> None:
    expected = {
        "mores": {"learning_rate": "2e-4", "num_train_epochs": "1", "mores_tokens": "1%"},
        "mixlora": {"learning_rate": "4e-5", "num_train_epochs": "3", "mixlora_factors": "16"},
        "mores_4bit": {"learning_rate": "2e-4", "bits": "4", "gradient_accumulation_steps": "4"},
        "task_mores": {"learning_rate": "2e-4", "num_train_epochs": "10", "freeze_mm_mlp_adapter": "True"},
    }
    for name, flags in expected.items():
        mode = "mixlora" if name == "mixlora" else "mores"
        flags |= {f"{mode}_dropout": "0.05", "model_max_length": "1792" if name == "mixlora" else "2048"}
    common = {"lr_scheduler_type": "cosine", "warmup_ratio": "0.03", "gradient_checkpointing": "True"}
    for name, flags in expected.items():
        words = flags_of(name, patched_llava, checkout, "--seed", "7", GPUS="8")
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert {key: given[f"--{key}"] for key in flags | common} == flags | common
        assert int(given["--per_device_train_batch_size"]) * int(given["--gradient_accumulation_steps"]) * 8 == 128
        assert given["--seed"] == "7" and given["--deepspeed"] == "./scripts/zero2.json"


def test_a_task_brings_its_own_data_which_is_made_once(checkout: Path, patched_llava: Path) -> None:
    source = make_source("iconqa_blank", checkout / "iconqa")
    task = {"TASK": "iconqa_blank", "SOURCE": str(source), "SAMPLES": "1", "GPUS": "8"}
    for _ in range(2):
        done = run("task_mores", patched_llava, checkout, LAUNCHER="printf %s\\n", **task)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--data_path"] == "./playground/data/tasks/iconqa_blank_train_1.json"
    assert given["--output_dir"] == "./checkpoints/llava-v1.5-7b-iconqa_blank-mores"
    (sample,) = json.loads((checkout / given["--data_path"]).read_text())
    assert (checkout / given["--image_folder"] / sample["image"]).is_file()

    refused = run("task_mores", patched_llava, checkout, **task | {"DATA": "mine.json"})
    assert refused.returncode == 2 and "TASK iconqa_blank brings its own data" in refused.stderr
    refused = run("task_mores", patched_llava, checkout, TASK="iconqa_blank")
    assert refused.returncode == 2 and "give its folder as SOURCE" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_script_trains_the_tiny_model_to_an_adapter(
    tiny: TinyLlava, patched_llava: Path, checkout: Path, name: str
) -> None:
    launch = "-m llava_steering_plugin.launch --cpu llava.train.train"
    asked = {
        "MODEL": str(tiny.llava if name == "task_mores" else tiny.llm),
        "DATA": str(tiny.data),
        "IMAGES": str(tiny.images),
        "TOWER": str(tiny.tower),
        "OUTPUT": str(checkout / "out"),
        "GPUS": "1",
        "BATCH": "4",
        "GLOBAL_BATCH": "8",
        "ZERO": "",
        "LAUNCHER": f"{sys.executable} {launch}",
    }
    flags = ["--max_steps", "2", "--model_max_length", "512", "--tf32", "False", "--use_cpu", "True"]
    flags += ["--dataloader_num_workers", "0"]
    if name != "task_mores":
        asked["PROJECTOR"] = str(tiny.projector)
    if name == "mores_4bit":
        # transformers refuses to quantise without a GPU; this starts the same program where it does not.
        asked["LAUNCHER"] = (
            f"{sys.executable} {Path(__file__).parents[1] / 'support' / 'quantising.py'} --cpu llava.train.train"
        )
    done = run(name, patched_llava, checkout, *flags, **asked)

    assert done.returncode == 0, done.stderr[-3000:]
    stored = read(checkout / "out")
    assert stored.config.mode == ("mixlora" if name == "mixlora" else "mores")
    assert stored.config.trained_on["bits"] == (4 if name == "mores_4bit" else 16)
    assert bool(stored.section(EXTRA)) == (name != "task_mores")
