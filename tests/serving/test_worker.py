"""The command line of the worker: what cannot work is refused before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from base_folders import base_folder
from ports import free_port
from tiny_llava import TinyLlava, without_half_of_its_weights

from llava_steering_plugin.errors import ArgumentsError, SteeringError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--admin-token", "secret"], "needs 16 at least"),
        (["--adapter-dir", "nowhere"], "nowhere is no folder"),
        (["--host", "0.0.0.0"], "--worker-address"),
        (["--adapters", "two words=x", "a/b", "c/b"], "both called 'b'"),
    ],
)
@pytest.mark.usefixtures("patched_llava")
def test_a_command_line_that_cannot_work_is_refused_with_all_that_is_wrong(words: list[str], said: str) -> None:
    from llava_steering_plugin.serving.worker import app

    with pytest.raises(SteeringError, match=rf"(?s){said}") as refused:
        app(["--model-path", "no/such-model", "--port", str(free_port()), *words], standalone_mode=False)
    assert "there is no folder no/such-model" in str(refused.value)


@pytest.mark.usefixtures("patched_llava")
def test_places_without_an_adapter_are_all_named_with_a_base_that_is_not_there(tmp_path: Path) -> None:
    from llava_steering_plugin.serving.worker import app

    said = r"(?s)/no/such/cats is no folder.* holds no adapter.* there is no folder no/such-model"
    with pytest.raises(SteeringError, match=said):
        words = ["--adapters", "/no/such/cats", f"pets={tmp_path}"]
        app(["--model-path", "no/such-model", *words], standalone_mode=False)


def test_a_base_that_cannot_be_loaded_is_a_message_and_no_traceback(tiny: TinyLlava, tmp_path: Path) -> None:
    from llava_steering_plugin.serving.worker import app

    broken = without_half_of_its_weights(tiny.llava, tmp_path / "broken")
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "config.json").write_text('{"mm_vision_tower": "a tower"}')
    for base, said in (
        (broken, r"broken/model\.safetensors is damaged or cut short"),
        (nameless, "names no model_type.*--model-path"),
    ):
        with pytest.raises(SteeringError, match=said):
            app(["--model-path", str(base), "--device", "cpu", "--port", str(free_port())], standalone_mode=False)


@pytest.mark.usefixtures("patched_llava")
def test_a_second_worker_on_a_port_is_refused_before_its_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both bind with SO_REUSEADDR, which one that does not listen yet does not keep others from."""
    from llava_steering_plugin.serving import model_worker, worker

    class Loading(Exception):
        """The first has come as far as to its model."""

    listeners: list[socket.socket] = []
    bound = worker.bind
    monkeypatch.setattr(worker, "bind", lambda *where: listeners.append(bound(*where)) or listeners[-1])
    words = ["--model-path", str(base_folder(tmp_path / "base")), "--port", str(free_port()), "--stall-seconds", "7"]

    def load(*_: Any, **__: Any) -> None:
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections that are made from now on take it over
            assert listeners[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
        with pytest.raises(ArgumentsError, match=r"cannot listen on .*in use"):
            worker.app(words, standalone_mode=False)
        raise Loading

    monkeypatch.setattr(model_worker, "AdapterWorker", load)
    with pytest.raises(Loading):
        worker.app(words, standalone_mode=False)
    [listener] = listeners
    listener.close()
