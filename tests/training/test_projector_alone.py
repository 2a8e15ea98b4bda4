"""`--tuning_mode projector`: the projector alone is trained, checked, saved, resumed and used as adapters are.

Covers `modes/projector.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_samples import write_data
from diagnosing import diagnosed
from pooled import answer
from rank_runs import text_data
from steered import PROMPT, generate, ids_of, load_llava, pictures
from tiny_llava import HIDDEN, TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin import AdapterPool, load_adapter, remove_adapter
from llava_steering_plugin.adapters.stored.folder import ADAPTER, CARD, EXTRA
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.planning.plan import plan

FLAGS: dict[str, object] = {"tuning_mode": "projector", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
NAMES = [f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")]


@pytest.fixture(scope="module")
def trained(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("projector") / "run"
    train_in_process(train_flags(tiny, output, FLAGS))
    return output


def test_the_adapter_holds_a_projector_that_changed_and_nothing_else(trained: Path, tiny: TinyLlava) -> None:
    stored, before = read(trained), torch.load(tiny.projector, weights_only=True)
    assert not stored.section(ADAPTER)
    assert sorted(stored.section(EXTRA)) == NAMES
    assert all(not torch.equal(value.half(), before[name]) for name, value in stored.section(EXTRA).items())
    assert "the result of tuning mode `projector`" in (trained / CARD).read_text()


def test_a_resumed_run_ends_bit_equal(trained: Path, tiny: TinyLlava, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, tmp_path / "run", FLAGS))
    resumed, whole = read(tmp_path / "run").tensors, read(trained).tensors
    assert resumed.keys() == whole.keys()
    assert not [name for name, value in whole.items() if not torch.equal(value, resumed[name])]


def test_a_row_of_a_pool_answers_by_it_as_it_does_alone_and_its_removal_gives_the_base_back(
    trained: Path, tiny: TinyLlava
) -> None:
    model = load_llava(tiny.llava)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels, ids = pictures(1), ids_of(PROMPT)

    def logits(**named: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, images=pixels, **named).logits  # type: ignore[no-any-return]

    plain = logits()
    load_adapter(model, trained)
    alone = logits()
    assert not torch.allclose(alone, plain, atol=1e-3)
    remove_adapter(model)
    assert not [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    pool = AdapterPool(model)
    pool.load("bridge", trained)
    assert torch.equal(logits(adapter_names="bridge"), alone)
    assert torch.equal(logits(), plain)
    assert answer(model) == generate(model, ids, pixels, do_sample=False)


def test_interference_is_measured_in_the_projector(trained: Path, tiny: TinyLlava, tmp_path: Path) -> None:
    samples = [sample for sample in json.loads(tiny.data.read_text()) if "image" in sample][:4]
    tasks = write_data(tmp_path, [sample | {"task": f"task {at % 2}"} for at, sample in enumerate(samples)])
    words = (str(trained), "--data", str(tasks), "--samples", "1")
    (model,) = diagnosed("interference", tiny, tmp_path / "out", *words)["models"]
    groups = {f"mm_projector.{layer} {kind}" for layer in (0, 2) for kind in ("bias", "weight")}
    assert model["kind"] == "projector" and model["groups"].keys() == groups | {"all"}
    assert model["groups"]["all"]["ratio_of_means"][0][1] != 0


def test_a_plan_counts_it_from_the_configs_alone(tiny: TinyLlava) -> None:
    words = ["--model_name_or_path", str(tiny.llava), "--tuning_mode", "projector", "--vision_tower", str(tiny.tower)]
    found = plan([*words, "--mm_projector_type", "mlp2x_gelu"])
    assert found.problems == () and found.counts is not None
    assert (found.counts.mode, found.counts.other) == (0, 2 * (HIDDEN * HIDDEN + HIDDEN))


def test_texts_alone_do_not_count_as_a_projector_that_cannot_learn(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = {"data_path": text_data(tiny, tmp_path), "max_steps": 12, "per_device_train_batch_size": 1}
    train_in_process(train_flags(tiny, tmp_path / "run", {**FLAGS, **flags, "save_strategy": "no"}))
    assert sorted(read(tmp_path / "run").section(EXTRA)) == NAMES


def test_a_frozen_projector_leaves_nothing_to_train(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_in_process(train_flags(tiny, tmp_path / "run", {**FLAGS, "freeze_mm_mlp_adapter": True}))
    assert "--freeze_mm_mlp_adapter True leaves nothing to train" in capsys.readouterr().err
