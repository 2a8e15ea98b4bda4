"""PEFT and transformers do not take an adapter folder for theirs, and say so; see `adapters/stored/writing.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import as_version_0_1
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from steered import strengthen
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

from llava_steering_plugin import attach, load_adapter, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

NO_PEFT_ADAPTER = r"^Can't find 'adapter_config\.json' at '{}'$"


@pytest.fixture
def base(tmp_path: Path) -> LlamaForCausalLM:
    """A plain language model, with its folder beside the test's."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "base")


def peft_calls(base: Any, folder: str) -> dict[str, Callable[[], Any]]:
    return {
        "PeftConfig": lambda: PeftConfig.from_pretrained(folder),
        "PeftModel": lambda: PeftModel.from_pretrained(base, folder),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
    }


@pytest.mark.parametrize("call", ["PeftConfig", "PeftModel", "AutoPeftModel"])
@pytest.mark.parametrize("over", [False, True], ids=["a fresh folder", "over an adapter of version 0.1"])
def test_peft_says_that_the_folder_holds_no_adapter_of_its_own(
    base: LlamaForCausalLM, saved: Path, model: Any, steered: Callable[..., Attachment], call: str, over: bool
) -> None:
    if over:
        as_version_0_1(saved)
        with pytest.raises(KeyError, match="LLAVA_MORES"):
            peft_calls(base, str(saved))[call]()
        steered(rank=3)
        save_adapter(model, saved)
    with pytest.raises(ValueError, match=NO_PEFT_ADAPTER.format(re.escape(str(saved)))):
        peft_calls(base, str(saved))[call]()


def test_transformers_says_that_the_folder_holds_no_model_and_does_not_load_the_base_instead(
    base: LlamaForCausalLM, saved: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    attachment = strengthen(attach(base, MoReS(rank=1)))
    save_adapter(base, plain)
    attachment.remove()
    for folder in (saved, plain):
        no_model = rf"no file named pytorch_model\.bin.* found in directory {re.escape(str(folder))}"
        with pytest.raises(OSError, match=no_model):
            AutoModelForCausalLM.from_pretrained(str(folder))
        # With the old name, a pipeline loaded the base and said nothing.
        with pytest.raises(ValueError, match=rf"(?s)Could not load model {re.escape(str(folder))}.*{no_model}"):
            pipeline("text-generation", str(folder))
        with pytest.raises(ValueError, match="adapter model file not found in"):
            base.load_adapter(str(folder))
    # Where llava is not imported, its model type is one that transformers does not know.
    described = json.loads((saved / "config.json").read_text()) | {"model_type": "llava_unheard_of"}
    (saved / "config.json").write_text(json.dumps(described))
    for call in (AutoModelForCausalLM.from_pretrained, lambda name: pipeline("text-generation", name)):
        with pytest.raises(ValueError, match="llava_unheard_of` but Transformers does not recognize this architecture"):
            call(str(saved))


def test_a_foreign_adapter_of_pefts_that_is_replaced_leaves_nothing_that_peft_would_load(
    model: Any, steered: Callable[..., Attachment], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    get_peft_model(small, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "pets")
    assert json.loads((tmp_path / "pets" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    attachment = steered(rank=3)
    save_adapter(model, tmp_path / "pets")
    attachment.remove()
    with pytest.raises(ValueError, match=NO_PEFT_ADAPTER.format(".*")):
        PeftConfig.from_pretrained(str(tmp_path / "pets"))
    assert load_adapter(model, tmp_path / "pets").mode == MoReS(rank=3, tokens="all")
