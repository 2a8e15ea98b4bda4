"""The base of an adapter that LLaVA's own loader has loaded: off, removed, in a chat, and over a plain language model.

Also `inference/models.py`, where adapters that need more of their base than a projector are put into a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_parts import ROW, save
from snapshots import differences, snapshot
from steered import ids_of, load_llava, strengthen, words
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, attachment_of, disabled, load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.models import load_adapter_and_base
from llava_steering_plugin.modes.mores import MoReS

pytestmark = pytest.mark.usefixtures("patched_llava")

BASE = "__base__"


def load(path: Path) -> tuple[Any, Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(path), None, get_model_name_from_path(str(path)), device="cpu")[:3]


def answers(loaded: tuple[Any, Any, Any], tiny: TinyLlava, **named: Any) -> dict[str, torch.Tensor]:
    """What is said to a picture that is cut as `config` says, and to text."""
    from llava.mm_utils import process_images
    from PIL import Image

    config = named.pop("config", loaded[1].config)
    picture = Image.open(tiny.images / "01.png").convert("RGB")  # 80 x 48: padded or cut, that makes a difference
    pixels = process_images([picture], loaded[2], config).half()
    with torch.inference_mode():
        return {
            "logits": loaded[1](input_ids=ids_of(ROW), images=pixels, **named).logits,
            "text": loaded[1](input_ids=ids_of(words(8)), **named).logits,
        }


def equal(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(here[name], there[name]) for name in here.keys() | there.keys())


@pytest.mark.parametrize("kind", ["projector", "tokens", "settings"])
def test_removed_or_off_the_base_is_what_upstreams_loader_makes_of_it(
    tiny: TinyLlava, tmp_path: Path, kind: str
) -> None:
    plain = load(tiny.llava)
    before, expected = snapshot(*plain[1::-1]), answers(plain, tiny)
    folder = save(tiny, kind, tmp_path / "llava-it")
    loaded = load(folder)
    model, tokenizer, _ = loaded[1], loaded[0], loaded[2]
    tuned, attachment = answers(loaded, tiny), attachment_of(model)
    assert attachment is not None and not equal(tuned, expected)
    with disabled(model):
        assert equal(answers(loaded, tiny, config=attachment.original.config()), expected)
    assert equal(answers(loaded, tiny), tuned)
    remove(model)
    assert differences(before, snapshot(model, tokenizer)) == []
    load_adapter(model, folder, tokenizer)
    assert equal(answers(loaded, tiny), tuned), "as upstream's loader has it"


@pytest.fixture
def over_plain_llm(tiny: TinyLlava, tmp_path: Path) -> Path:
    """An adapter over a language model without vision: it brings the whole projector."""
    model = load_llava(tiny.llava)
    attachment = strengthen(attach(model, MoReS(rank=2, tokens="all")))
    described = describe(attachment)
    attachment.config = replace(described, base=replace(described.base, name_or_path=str(tiny.llm)))
    attachment.extras |= image_parameters(model).keys()
    save_adapter(model, tmp_path / "llava-over-llm")
    return tmp_path / "llava-over-llm"


def test_a_plain_language_model_has_no_projector_and_that_is_said(
    tiny: TinyLlava, over_plain_llm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaForCausalLM

    language = LlamaForCausalLM.from_pretrained(tiny.llm, torch_dtype=torch.float16)
    with torch.inference_mode():
        expected = language(ids_of(words(8))).logits
    loaded = load(over_plain_llm)
    model = loaded[1]
    answers(loaded, tiny)
    assert "has no projector" not in caplog.text, "with the adapter there is nothing to say"
    projector = {name: value.clone() for name, value in image_parameters(model).items()}
    with disabled(model):
        off = answers(loaded, tiny)
    assert torch.equal(off["text"], expected)
    assert caplog.text.count("has no projector. Without the adapter, images still go through the adapter's") == 1
    remove(model)
    assert equal(answers(loaded, tiny), off)
    assert all(torch.equal(value, projector[name]) for name, value in image_parameters(model).items())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in language.state_dict().items())


@pytest.mark.parametrize("kind", ["tokens", "settings"])
def test_in_a_pool_that_was_changed_for_its_adapters_the_base_has_its_own_parts(
    tiny: TinyLlava, tmp_path: Path, kind: str
) -> None:
    expected = answers(load(tiny.llava), tiny)
    folders = [save(tiny, kind, tmp_path / f"llava-{seed}", seed) for seed in (0, 1)]
    alone = [answers(load(folder), tiny) for folder in folders]
    opened = load_adapter_and_base("one", read(folders[0]), None, {"device": "cpu"})
    pool, loaded = opened.pool, (opened.tokenizer, opened.pool.model, opened.processor)
    assert equal(answers(loaded, tiny, config=pool.config_of(BASE), adapter_names=BASE), expected)
    assert equal(answers(loaded, tiny, config=pool.config_of("one"), adapter_names="one"), alone[0])
    if kind == "settings":
        pool.load("other", folders[1])
        assert equal(answers(loaded, tiny, adapter_names="other"), alone[1])
    with disabled(pool.model):
        assert equal(answers(loaded, tiny, config=pool.config_of(BASE)), expected)
    with pytest.raises(ArgumentsError, match="Ask the base in a batch of its own"):
        pool.model(input_ids=ids_of(words(8), words(8)), adapter_names=["one", BASE])
    before = load(tiny.llava)
    pool.remove()
    assert differences(snapshot(*before[1::-1]), snapshot(pool.model, opened.tokenizer)) == []


def test_a_chat_cuts_pictures_for_the_base_as_the_base_does(
    tiny: TinyLlava, ask: Callable[..., str], tmp_path: Path
) -> None:
    from asking import Question

    from llava_steering_plugin.chat.session import open_chat

    question = Question("What color is the circle?", "01.png")
    folder = save(tiny, "settings", tmp_path / "llava-it")
    chat = open_chat(str(folder), {"it": str(folder)}, first="it", temperature=0, max_new_tokens=12, conversation="v1")
    said = {}
    for name in ("it", BASE):
        chat.use(name)
        chat.look_at(str(tiny.images / "01.png"))
        said[name] = chat.ask(question.text, lambda piece: None).text
    assert said == {
        "it": ask(folder, question, conversation="v1", max_new_tokens=12),
        BASE: ask(tiny.llava, question, conversation="v1", max_new_tokens=12),
    }
    assert said["it"] != said[BASE]
