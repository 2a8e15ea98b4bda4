"""A chat is opened on a base or an adapter, and what cannot be loaded is refused in one message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import Asker, Question
from steered import strengthen
from tiny_llava import TinyLlava, without_half_of_its_weights
from typer.testing import CliRunner

from llava_steering_plugin import attach, remove, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

SHORT = 12  # tokens of an answer


@pytest.fixture
def chat(patched_llava: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `llava-steering chat` in this process, without what it changes for all of its process."""
    monkeypatch.setattr("llava.utils.disable_torch_init", lambda: None)
    monkeypatch.setattr("llava_steering_plugin.cli.chat.quieten_libraries", lambda: None)

    def run(*words: str) -> None:
        result = CliRunner().invoke(app, ["chat", *words, "--device", "cpu"])
        if isinstance(result.exception, SteeringError):
            raise result.exception
        assert result.exit_code == 0, result.output

    return run


def test_an_adapter_that_brings_what_its_base_lacks_answers_as_it_does_alone(
    _shared: Any, tiny: TinyLlava, ask: Asker, tmp_path: Path
) -> None:
    from llava_steering_plugin.chat.session import open_chat

    question = Question("What color is the circle?", "01.png")  # 80 x 48: padded or cut, that makes a difference

    def saved(name: str, base: Path, *, extras: set[str]) -> Path:
        attachment = strengthen(attach(_shared, MoReS(rank=2, tokens="all")), seed=7)
        described = describe(attachment)
        attachment.config = replace(described, conversation="v1", base=replace(described.base, name_or_path=str(base)))
        attachment.extras |= extras
        save_adapter(_shared, tmp_path / name)
        remove(_shared)
        return tmp_path / name

    projector = {name for name, _ in _shared.named_parameters() if "mm_projector" in name}
    over_plain_llm = saved("over-plain-llm", tiny.llm, extras=projector)
    before = _shared.config.image_aspect_ratio
    _shared.config.image_aspect_ratio = "square"
    other_images = saved("other-images", tiny.llava, extras=set())
    _shared.config.image_aspect_ratio = before

    answers = []
    for folder in (over_plain_llm, other_images):
        named = {"it": str(folder)}
        chat = open_chat(str(folder), named, first="it", temperature=0, max_new_tokens=SHORT)
        chat.look_at(str(tiny.images / str(question.image)))
        answers.append(chat.ask(question.text, lambda piece: None).text)
        assert answers[-1] == ask(folder, question, conversation="llava_v1", max_new_tokens=SHORT)
    assert answers[0] != answers[1], "the way of cutting images changes nothing, so nothing is shown"


def test_what_cannot_be_loaded_is_said_with_what_to_do(_shared: Any, tiny: TinyLlava, tmp_path: Path) -> None:
    from llava_steering_plugin.chat.session import open_chat

    with pytest.raises(SteeringError, match="no-model is no model that can be loaded"):
        open_chat(str(tmp_path / "no-model"), {})
    attachment = attach(_shared, MoReS(rank=1))
    described = describe(attachment)
    attachment.config = replace(described, base=replace(described.base, name_or_path=str(tmp_path / "moved")))
    save_adapter(_shared, tmp_path / "cats")
    remove(_shared)
    with pytest.raises(SteeringError, match="if it has moved, say where it is with --model-base"):
        open_chat(str(tmp_path / "cats"), {"cats": str(tmp_path / "cats")}, first="cats")
    with pytest.raises(ArgumentsError, match="did you mean 'llava_v1'"):
        open_chat(str(tiny.llava), {}, conversation="lava_v1")


def test_the_adapter_that_a_chat_is_begun_with_may_be_given_a_name(
    _shared: Any, tiny: TinyLlava, chat: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.chat.terminal import Terminal

    attachment = attach(_shared, MoReS(rank=1))
    described = describe(attachment)
    attachment.config = replace(described, base=replace(described.base, name_or_path=str(tiny.llava)))
    save_adapter(_shared, tmp_path / "my adapter")
    remove(_shared)
    opened = []
    monkeypatch.setattr(Terminal, "run", lambda terminal: opened.append(terminal.chat))
    with pytest.raises(SteeringError, match=r"'my adapter' cannot be the name .*NAME=PATH"):
        chat(f"{tmp_path}/my adapter")
    chat(f"pets={tmp_path}/my adapter")
    [begun] = opened
    assert begun.adapter == "pets" and begun.pool.names() == ["__base__", "pets"]
    with pytest.raises(SteeringError, match=r"only adapters can be given a name, and .* is no adapter"):
        chat(f"pets={tiny.llava}")


def test_an_image_that_cannot_be_read_is_said_before_a_model_is_looked_for(
    chat: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for file, said in (("nowhere.png", "there is no file .*nowhere.png"), ("notes.txt", "cannot be read as an image")):
        with pytest.raises(SteeringError, match=said):
            chat(str(tmp_path / "no-model"), "--image", str(tmp_path / file))


def test_a_base_that_is_damaged_is_a_message_and_no_traceback(tiny: TinyLlava, tmp_path: Path) -> None:
    from llava_steering_plugin.chat.session import open_chat

    broken = without_half_of_its_weights(tiny.llava, tmp_path / "broken")
    with pytest.raises(SteeringError, match=r"broken cannot be loaded: .*all of its files are there and complete"):
        open_chat(str(broken), {})


def test_a_conversation_that_llava_would_cut_is_refused_and_goes_on_after_a_reset(tiny: TinyLlava) -> None:
    from llava_steering_plugin.chat.conversation import ChatError
    from llava_steering_plugin.chat.session import open_chat

    chat = open_chat(str(tiny.llava), {}, temperature=0, max_new_tokens=2)
    chat.look_at(str(tiny.images / "01.png"))
    chat.model.config.tokenizer_model_max_length = 100
    with pytest.raises(ChatError, match=r"too long: \d+ tokens .* takes 100\. /reset begins a new one"):
        chat.ask("What color is it? " * 30, lambda piece: None)
    assert chat.turns == 0
    chat.ask("What color is it?", lambda piece: None)
    chat.drop_image()
    chat.ask("What color is it? " * 30, lambda piece: None)  # without an image, LLaVA cuts nothing
