"""An adapter that LLaVA has trained brings the chat template that writes its prompts, for users of transformers.

That of `training/provenance.py`, which notes it, and of `adapters/stored/chat_template.py`.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapter_files import header_of
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, chat_template_of, remove_adapter, save_adapter
from llava_steering_plugin.adapters.stored.folder import HEADER, AdapterFolder
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.export.verification import DIALOGUES, messages_of, prompt_of
from llava_steering_plugin.training.provenance import record

pytest_plugins = ["steered_fixtures"]


@pytest.fixture
def conversation() -> Iterator[Any]:
    """LLaVA's module, whose default is what a training writes its prompts with; as before afterwards."""
    from llava import constants, conversation

    assert constants
    before = conversation.default_conversation
    yield conversation
    conversation.default_conversation = before


def trained(model: Any, tiny: TinyLlava, folder: Path) -> Path:
    """An adapter as a training writes it."""
    before = model.config._name_or_path
    model.config._name_or_path = str(tiny.llava)
    record(attach(model, "mores", rank=1), Namespace(fp16=False, bf16=False, bits=16), None, None, ())
    save_adapter(model, folder)
    remove_adapter(model)
    model.config._name_or_path = before
    return folder


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    )


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "phi", "qwen2", "gemma"])
def test_it_writes_llavas_prompt_letter_by_letter(
    model: Any, tiny: TinyLlava, conversation: Any, tmp_path: Path, name: str, dialogue: str
) -> None:
    template = conversation.conv_templates[name]
    conversation.default_conversation = template
    folder = trained(model, tiny, tmp_path)
    prompt = prompt_of(template, DIALOGUES[dialogue], "<image>")
    assert rendered(chat_template_of(folder), messages_of(DIALOGUES[dialogue])) == prompt


def test_it_marks_images_as_the_training_did(model: Any, tiny: TinyLlava, conversation: Any, tmp_path: Path) -> None:
    conversation.default_conversation = conversation.conv_templates["v1"]
    model.config.mm_use_im_start_end = True
    folder = trained(model, tiny, tmp_path)
    model.config.mm_use_im_start_end = False
    prompt = rendered(chat_template_of(AdapterFolder(folder).read()), messages_of(DIALOGUES["one turn"]))
    assert "USER: <im_start><image><im_end>\n" in prompt


def test_prompts_that_are_no_chat_have_none(model: Any, tiny: TinyLlava, conversation: Any, tmp_path: Path) -> None:
    conversation.default_conversation = conversation.conv_templates["plain"]
    folder = trained(model, tiny, tmp_path)
    assert "chat_template" not in json.loads(header_of(folder)[HEADER])
    with pytest.raises(AdapterError, match=r"conversation template plain.*export BASE DST --conversation plain"):
        chat_template_of(folder)


def test_training_says_that_a_forks_kind_of_template_becomes_no_chat_template(
    model: Any,
    tiny: TinyLlava,
    conversation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    of_a_fork = SimpleNamespace(turns=("USER", "ASSISTANT"))
    monkeypatch.setitem(conversation.conv_templates, "fork", of_a_fork)
    conversation.default_conversation = of_a_fork
    folder = trained(model, tiny, tmp_path)
    assert "chat_template" not in json.loads(header_of(folder)[HEADER])
    said = [each.getMessage() for each in caplog.records if "chat template" in each.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("conversation template fork: the adapter brings no chat template for transformers: ")


def test_an_adapter_of_transformers_says_whose_template_is_its_own(model: Any, tiny: TinyLlava, tmp_path: Path) -> None:
    save_of_model_alone(model, tmp_path)
    with pytest.raises(AdapterError, match="Use the one of the processor that it was trained with"):
        chat_template_of(tmp_path)


def save_of_model_alone(model: Any, folder: Path) -> None:
    attach(model, "mores", rank=1)
    save_adapter(model, folder)
    remove_adapter(model)


def test_what_is_no_text_is_refused(model: Any, tiny: TinyLlava, tmp_path: Path) -> None:
    from llava_steering_plugin.adapters.stored.config import AdapterConfig

    save_of_model_alone(model, tmp_path)
    config = AdapterFolder(tmp_path).config
    text = replace(config, chat_template="{{ 1 }}").to_json()
    assert AdapterConfig.from_json(text, "it").chat_template == "{{ 1 }}"
    damaged = json.dumps(json.loads(text) | {"chat_template": ["{{ 1 }}"]})
    with pytest.raises(AdapterError, match="chat_template is"):
        AdapterConfig.from_json(damaged, "it")
