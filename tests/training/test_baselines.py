"""`--tuning_mode peft`: PEFT's methods trained through upstream's train(), with what all modes have.

Covers `modes/peft/`, as far as trainings use it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from baselines import TRAINED, by_peft, flags_of, moved
from quantising import quantising_on_cpu
from steered import PROMPT, ids_of, load_llava, logits_of, pictures
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin import disable_adapter, load_adapter
from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA, WEIGHTS
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.inference.models import open_model
from llava_steering_plugin.inference.tunable import open_tunable
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan


@pytest.fixture(scope="module")
def root(patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baselines")


def trained(tiny: TinyLlava, root: Path, name: str) -> Path:
    if not (root / name).exists():
        train_in_process(train_flags(tiny, root / name, flags_of(name)))
    return root / name


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_moves_every_parameter_and_resumes_bit_equal(
    tiny: TinyLlava, root: Path, tmp_path: Path, name: str
) -> None:
    whole = read(trained(tiny, root, name))
    start = read(root / name / "checkpoint-2").section(ADAPTER)
    assert not whole.section(EXTRA)
    assert not [key for key, value in whole.section(ADAPTER).items() if torch.equal(value, start[key])]
    shutil.copytree(root / name / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, tmp_path / "run", flags_of(name)))
    resumed = read(tmp_path / "run")
    assert resumed.config == whole.config
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert not [key for key, value in whole.tensors.items() if not torch.equal(value, resumed.tensors[key])]


@pytest.mark.parametrize("name", TRAINED)
def test_a_plan_counts_what_a_training_trains_and_its_memory(tiny: TinyLlava, root: Path, name: str) -> None:
    flags = train_flags(tiny, tmp := root / "planned", flags_of(name))
    found = plan(flags, Wanted(gpu="24"))
    assert found.problems == () and found.counts is not None and found.memory is not None
    assert found.counts.mode == sum(
        value.numel() for value in read(trained(tiny, root, name)).section(ADAPTER).values()
    )
    assert not tmp.exists()


@pytest.mark.parametrize("name", TRAINED)
def test_a_base_of_four_bits_trains_it_in_float32_and_answers_by_it(tiny: TinyLlava, tmp_path: Path, name: str) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    with quantising_on_cpu():
        train_in_process(train_flags(tiny, tmp_path / "run", {**flags_of(name), "bits": 4, "save_strategy": "no"}))
        found = get_model_name_from_path(str(tmp_path / "run"))
        _, model, _, _ = load_pretrained_model(str(tmp_path / "run"), None, found, device="cpu", load_4bit=True)
    stored = read(tmp_path / "run")
    assert {value.dtype for value in stored.section(ADAPTER).values()} == {torch.float32}
    with torch.no_grad():
        moved(required(model).parameters().values(), size=0.3)
    ids, pixels = ids_of(PROMPT), pictures(1).half()
    here = logits_of(model, ids, pixels)
    with disable_adapter(model):
        plain = logits_of(model, ids, pixels)
    assert here.isfinite().all() and not torch.allclose(here, plain, atol=1e-2)


def test_chats_and_diagnoses_open_it_as_any_adapter(tiny: TinyLlava, root: Path) -> None:
    folder = str(trained(tiny, root, "lora"))
    how = {"device": "cpu", "load_4bit": False, "load_8bit": False}
    opened = open_model(folder, None, how)
    details = opened.loaded.pool.details(opened.adapter)
    assert (opened.kind, opened.base, details.mode) == ("peft", str(tiny.llava), "peft")
    assert details.parameters == sum(value.numel() for value in read(folder).section(ADAPTER).values())
    tunable = open_tunable(folder, None, how)
    assert tunable.kind == "peft" and tunable.parameters.keys() == read(folder).section(ADAPTER).keys()
    assert all(parameter.requires_grad for parameter in tunable.parameters.values())


def test_peft_loads_a_trained_lora_on_the_plain_base_and_answers_alike(tiny: TinyLlava, root: Path) -> None:
    folder = trained(tiny, root, "lora")
    ours, theirs = load_llava(tiny.llava), load_llava(tiny.llava)
    load_adapter(ours, folder)
    here = logits_of(ours, ids_of(PROMPT), pictures(1))
    assert torch.equal(here, logits_of(by_peft(theirs, folder), ids_of(PROMPT), pictures(1)))
    assert not [path.name for path in folder.iterdir() if path.suffix == ".bin" and path.name != "training_args.bin"]
    assert (folder / WEIGHTS).stat().st_size < 200_000
