"""docs/adding-a-mode.md: its example works as it stands there, and keeps the contract that the text below it states."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach, token_map

PAGE = (Path(__file__).parents[1] / "docs" / "adding-a-mode.md").read_text()
WIDTH = 32


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's module, under the name that its first line gives it."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    name = source.removeprefix('"""').partition(".py:")[0]
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, "adding-a-mode.md", "exec"), vars(module))
    return module


def llama(layers: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).eval()


def test_the_entry_point_on_the_page_is_the_class_under_its_modes_name(example: Any) -> None:
    ((name, module, found),) = re.findall(r"^ +(\w+) = (\w+):(\w+)$", PAGE, re.MULTILINE)
    assert module == example.__name__
    assert getattr(example, found).name == name


def test_the_example_is_the_identity_at_first_and_then_changes_visual_tokens_only(example: Any) -> None:
    model = llama(layers=1)
    embeds, visual = torch.randn(1, 6, WIDTH), torch.tensor([[0, 1, 1, 0, 0, 0]]).bool()

    def logits() -> torch.Tensor:
        with torch.no_grad(), token_map(visual):
            return model(inputs_embeds=embeds).logits

    plain = logits()
    attachment = attach(model, example.GainMode(scale=0.5))
    assert torch.equal(logits(), plain)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.normal_()
    assert torch.equal((logits() != plain).any(-1), visual), "after the only layer nothing mixes positions"


def test_without_any_image_every_parameter_of_the_example_still_has_a_gradient(example: Any) -> None:
    model = llama(layers=2)
    attachment = attach(model, example.GainMode())
    with token_map(torch.zeros(1, 5, dtype=torch.bool)):
        model(inputs_embeds=torch.randn(1, 5, WIDTH)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in attachment.parameters().values())
