"""`get_model`, `from_pretrained`, `save_pretrained` and `push_to_hub`: adapters as PEFT's users know them.

Covers `adapters/pretrained.py`.
"""

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
from chat_bases import BASES
from hub_stand_in import hub
from routed import small_llama
from steered import strengthen

from llava_steering_plugin import attachment_of, from_pretrained, get_model, remove_adapter
from llava_steering_plugin.errors import AdapterError, ArgumentsError, BaseMismatch, SteeringError
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    BASES["Llava"](folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a projector of its own, as a model saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_model(loaded(base), "mores", rank=2, tokens="all", train_projector=True)
    attachment = attachment_of(model)
    assert attachment is not None
    strengthen(attachment)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def loaded(base: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(base)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    mark = model.config.image_token_id
    ids = torch.tensor([[5, *[mark] * 16, 40, 41, 42]])
    torch.manual_seed(3)
    found: torch.Tensor = model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits
    return found


def test_only_the_adapter_is_trained_and_saved_until_it_is_removed(base: Path, tmp_path: Path) -> None:
    model = loaded(base)
    before = set(vars(model))
    assert get_model(model, MoReS(rank=2)) is model
    attachment = attachment_of(model)
    assert attachment is not None
    trained = {id(each) for each in model.parameters() if each.requires_grad}
    assert trained == {id(each) for each in attachment.trained().values()}
    model.save_pretrained(tmp_path / "adapter", max_shard_size="1GB", state_dict={})
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_model.safetensors", "llava_steering_config.json", "config.json", "README.md")
    }
    assert "from_pretrained(" in (tmp_path / "adapter" / "README.md").read_text()
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not (tmp_path / "elsewhere").exists()
    remove_adapter(model)
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_it_comes_back_with_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = from_pretrained(adapter)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    answer = logits(model)
    assert not torch.equal(answer, logits(loaded(base)))
    moved = shutil.copytree(base, tmp_path / "moved")
    assert torch.equal(logits(from_pretrained(adapter, base=moved)), answer)
    ready = loaded(base)
    assert from_pretrained(adapter, base=ready, is_trainable=True) is ready
    assert torch.equal(logits(ready), answer)
    attachment = attachment_of(ready)
    assert attachment is not None
    trained = {name for name, parameter in ready.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(attachment.trained()) + 4 and attachment.extras < trained
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), answer)
    half = from_pretrained(adapter, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(half).float(), answer, atol=0.5, rtol=0.1)


def test_another_base_and_none_at_all_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = loaded(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(-1)
    with pytest.raises(BaseMismatch):
        from_pretrained(adapter, base=other)
    assert attachment_of(other) is None and "save_pretrained" not in vars(other)
    with pytest.raises(SteeringError, match="there is no folder"):
        from_pretrained(adapter, base=tmp_path / "nowhere")
    with pytest.raises(ArgumentsError, match="takes no settings any more: dtype"):
        from_pretrained(adapter, base=other, dtype=torch.float16)
    with pytest.raises(AdapterError):
        from_pretrained(base)
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama", "mm_vision_tower": "clip"}')
    with pytest.raises(AdapterError, match="llava-steering export"):
        from_pretrained(adapter, base=tmp_path)


def test_a_projector_that_is_not_there_is_not_trained() -> None:
    plain = small_llama()
    with pytest.raises(ArgumentsError, match="has no projector"):
        get_model(plain, "mores", train_projector=True)
    assert attachment_of(plain) is None


def test_it_goes_to_the_hub_with_its_card_and_comes_back(base: Path, adapter: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads the address when it is imported."""
    program = """
import sys
import torch
from llava_steering_plugin import from_pretrained
model = from_pretrained(sys.argv[1])
print(model.push_to_hub("pets", commit_message="First", token="hf_x"))
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="someone/again", token="hf_x")
again = from_pretrained("someone/again")
for (name, value), other in zip(model.named_parameters(), again.parameters(), strict=True):
    assert torch.equal(value, other), name
"""
    with hub() as (address, repositories):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", program, str(adapter), str(tmp_path / "saved")],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    names = {path.name for path in adapter.iterdir()}
    for repository in ("someone/pets", "someone/again"):
        assert repositories[repository].keys() - {".gitattributes"} == names
    assert repositories["someone/pets"]["README.md"] == (adapter / "README.md").read_bytes()
