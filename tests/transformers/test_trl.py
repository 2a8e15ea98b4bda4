"""TRL's SFTTrainer with an adapter, on messages with real images; and `scripts/examples/trl_mores.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chat_bases import BASES, samples
from hub_stand_in import hub

from llava_steering_plugin import SteeringTrainerMixin, from_pretrained, get_model
from llava_steering_plugin.modes.mores import MoReS

for needed in ("trl", "easy_vqa"):
    pytest.importorskip(needed, reason=f"{needed} is missing: scripts/setup.sh --transformers installs it")
EXAMPLE = Path(__file__).parents[2] / "scripts" / "examples" / "trl_mores.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    BASES["Llava"](folder)
    return folder


def trained(base: Path, output: Path, *, resume: bool = False, **flags: Any) -> Any:
    """A training of four steps, or what is left of it; its trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class SteeringTrainer(SteeringTrainerMixin, SFTTrainer):
        """As a user writes it."""

    torch.manual_seed(1)
    model = get_model(transformers.AutoModelForImageTextToText.from_pretrained(base), MoReS(rank=2, dropout=0.2))
    args = SFTConfig(
        str(output),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "max_length": None,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | flags,
    )
    trainer = SteeringTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(samples(6)),
        processing_class=transformers.AutoProcessor.from_pretrained(base),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_it_trains_on_messages_and_resumes_to_the_bit(base: Path, tmp_path: Path) -> None:
    whole = trained(base, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = trained(base, tmp_path / "again", resume=True)
    first, second = (adapter_in(tmp_path / name / "checkpoint-4") for name in ("whole", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    logs = [[entry.get("loss") for entry in each.state.log_history] for each in (whole, again)]
    assert logs[0][:4] == logs[1][:4]
    card = (tmp_path / "whole" / "checkpoint-4" / "README.md").read_text()
    assert "llava-steering-plugin" in card and not (tmp_path / "whole" / "README.md").exists()


@pytest.mark.slow
def test_the_example_trains_saves_loads_and_answers(base: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLE), str(base), str(tmp_path / "out"), "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for _ in range(2):  # again: it resumes, and there is nothing left to do
        run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert samples(1)[0]["messages"][0]["content"][1]["text"] in run.stdout
    assert "is the end of this training" in run.stderr
    from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_training_uploads_its_adapter_and_card(base: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads the address when it is imported."""
    program = """
import sys
from pathlib import Path
from test_trl import trained
flags = {"push_to_hub": True, "hub_model_id": "someone/trained", "hub_token": "hf_x"}
trained(Path(sys.argv[1]), Path(sys.argv[2]), **flags).push_to_hub()
"""
    with hub() as (address, repositories):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        run = subprocess.run(
            [sys.executable, "-c", program, str(base), str(tmp_path / "run")],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    files = repositories["someone/trained"]
    assert {"adapter_model.safetensors", "llava_steering_config.json", "processor_config.json"} <= files.keys()
    assert not any(name.startswith(("model", "checkpoint")) for name in files)
    assert files["README.md"] == (tmp_path / "run" / "checkpoint-4" / "README.md").read_bytes()
    assert files["adapter_model.safetensors"] == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
