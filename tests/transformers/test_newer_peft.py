"""The mode `peft` (`modes/peft/`) with a PEFT that is newer than LLaVA's pins, on a small Llama of transformers 5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach, load_adapter, remove_adapter, save_adapter, token_map
from llava_steering_plugin.modes.peft.mode import Peft
from llava_steering_plugin.modes.peft.settings import METHODS

pytest.importorskip("peft", reason="scripts/setup.sh --transformers installs it")
WORDS = torch.arange(8)[None]
VARIANTS = [*((name, None) for name in METHODS), ("lora", '{"use_dora": true}')]


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with token_map(visual=torch.zeros_like(WORDS, dtype=torch.bool), attention=torch.ones_like(WORDS)):
        found: torch.Tensor = model(WORDS).logits
    return found


@pytest.mark.parametrize(("method", "config"), VARIANTS)
def test_a_method_begins_as_the_base_learns_and_is_what_peft_loads(
    method: str, config: str | None, tmp_path: Path
) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).eval()
    model.save_pretrained(tmp_path / "base")
    base = model(WORDS).logits
    attachment = attach(model, Peft(method, config))
    found = logits(model)
    assert torch.equal(found, base)
    found.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in attachment.parameters().values())
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tuned = logits(model)
    assert not torch.equal(tuned, base)
    save_adapter(model, tmp_path / "adapter")
    remove_adapter(model)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), tuned)
    remove_adapter(model)
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(theirs.eval()(WORDS).logits, tuned)
