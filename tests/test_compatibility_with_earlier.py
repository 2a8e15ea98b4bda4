"""Adapters and checkpoints of the first version load, answer and go on in this one, to the bit.

The first version is taken out of git and run here, so the same processor rounds the numbers of both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from earlier_package import earlier_package
from earlier_version import (
    ADAPTERS,
    ADDED,
    STOPPED_AT,
    TRAININGS,
    adapter_file,
    answer,
    load_by_upstream,
    load_llava,
    losses,
    tokenizer_of,
    training,
)
from forks import Forks
from safetensors.torch import load_file
from tiny_llava import TinyLlava
from training_runs import subprocess_environment, train_in_process

from llava_steering_plugin import AdapterPool, load_adapter
from llava_steering_plugin.training.data.samples import HASHED, SUMMED
from llava_steering_plugin.training.saving.notes import order_of

pytest_plugins = ["fork_fixtures"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def earlier(
    library_forks: Forks, tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the earlier version has made: adapters, their answers, and trainings."""
    package, out = earlier_package(tmp_path_factory.mktemp("package")), tmp_path_factory.mktemp("made")
    support = ROOT / "tests" / "support"
    environment = subprocess_environment(patched_llava)
    environment["PYTHONPATH"] = f"{package}:{patched_llava}:{support}"
    script = [str(support / "earlier_version.py"), str(package), str(tiny.root), str(out)]
    done = library_forks.run(*script, env=environment, cwd=out)
    assert not done.returncode, done.stderr[-4000:]
    return out


def assert_same_answer(found: dict[str, torch.Tensor], made: Path, name: str) -> None:
    expected = load_file(made / f"{name}.safetensors")
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    assert torch.equal(found["logits"], expected["logits"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_earlier_adapter_answers_as_it_did(earlier: Path, tiny: TinyLlava, name: str) -> None:
    assert (earlier / name / "adapter_config.json").is_file()
    model, tokenizer = load_llava(tiny.llava), tokenizer_of(tiny.llava)
    plain = answer(model, "")["logits"]
    attachment = load_adapter(model, earlier / name, tokenizer)
    assert_same_answer(answer(model, name), earlier, name)
    assert attachment.config is not None and attachment.config.conversation == "v1"
    if ADAPTERS[name][3]:
        assert {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED} == ADDED
    else:
        assert not torch.equal(answer(model, name)["logits"], plain)


def test_earlier_adapters_answer_in_a_pool_as_they_did(earlier: Path, tiny: TinyLlava) -> None:
    model = load_llava(tiny.llava)
    pool = AdapterPool(model)
    names = [name for name, (_, _, _, tokens) in ADAPTERS.items() if not tokens]
    for name in names:
        pool.load(name, earlier / name)
    for name in names:
        assert_same_answer(answer(model, name, adapter_names=name), earlier, name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_upstreams_loader_gives_the_model_that_it_gave(earlier: Path, patched_llava: Path, name: str) -> None:
    assert_same_answer(answer(load_by_upstream(earlier / name), name), earlier, f"{name}-by-upstream")


@pytest.mark.parametrize("name", TRAININGS)
def test_an_earlier_training_goes_on_from_its_checkpoint_as_it_would_have(
    earlier: Path, tiny: TinyLlava, name: str
) -> None:
    history: list[dict[str, Any]] = train_in_process(training(tiny, name, earlier / "waiting" / name))
    expected = json.loads((earlier / f"{name}.json").read_text())
    assert [entry["step"] for entry in expected] == list(range(1, 2 * STOPPED_AT + 1))
    assert losses(history) == expected
    here, there = (load_file(adapter_file(earlier / folder / name)) for folder in ("waiting", "resumed"))
    begun = load_file(adapter_file(earlier / "waiting" / name / f"checkpoint-{STOPPED_AT}"))
    assert here.keys() == there.keys()
    # Not to the bit: gradients are summed in another order now. Adam makes whole steps of MixLoRA's near zero.
    off, moved = (
        torch.cat([(one[key] - other[key]).flatten() for key in here]).norm()
        for one, other in ((here, there), (there, begun))
    )
    assert off < {"mores": 1e-5, "mixlora": 0.02}[name] * moved
    assert any(not torch.equal(value, begun[key]) for key, value in here.items()), "nothing was trained"
    # What it has saved now says that it keeps the order of the earlier version; a new training has another.
    assert order_of(earlier / "waiting" / name / f"checkpoint-{2 * STOPPED_AT}") == SUMMED != HASHED


def test_the_earlier_training_that_goes_on_comes_to_a_second_epoch(earlier: Path) -> None:
    history = json.loads((earlier / "mores.json").read_text())
    assert history[STOPPED_AT - 1]["epoch"] < 1 < history[-1]["epoch"]
