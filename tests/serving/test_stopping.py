"""SIGTERM while answers stream, to the worker and to `llava-steering serve`: `serving/http/server.py`."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from ports import free_port
from serving_fixtures import PATIENCE, TEXT_PROMPT, Question, wait_until
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin.serving.generation.request import STOPPING

pytest_plugins = ["serving_fixtures"]

LONG = 1500  # tokens: no answer of a test machine is complete in a second
ENDING = 120  # seconds, of which an answer may take 5; the rest is a busy machine's


class Stream:
    """An answer on its way, as the page or OpenAI's clients read it."""

    def __init__(self, address: str, model: str, openai: bool):
        self.openai = openai
        body: dict[str, Any] = Question(TEXT_PROMPT, tokens=LONG).body(model)
        url = f"{address}/worker_generate_stream"
        if openai:
            url = f"{address}/v1/chat/completions"
            messages = [{"role": "user", "content": "What do you like?"}]
            body = {"model": model, "messages": messages, "max_tokens": LONG, "temperature": 0, "stream": True}
        self.response = requests.post(url, json=body, stream=True, timeout=PATIENCE)
        assert self.response.ok, self.response.text
        self._events = self._read()
        self.last = next(self._events)

    def _read(self) -> Iterator[Any]:
        for line in self.response.iter_lines(chunk_size=1, delimiter=None if self.openai else b"\0"):
            if line and not line.startswith(b":"):
                text = line.decode().removeprefix("data: ")
                yield text if text == "[DONE]" else json.loads(text)

    def rest(self) -> list[Any]:
        """All further events. A connection that breaks off before its end raises an error."""
        return [self.last, *self._events]

    def ended(self) -> str:
        """ "whole", or what it says instead."""
        events = self.rest()
        if not self.openai:
            return "whole" if events[-1]["error_code"] == 0 else str(events[-1]["text"])
        assert events[-1] == "[DONE]", events[-1]
        error = events[-2].get("error")
        return "whole" if error is None else f"{error['code']}: {error['message']}"


ENDS = {False: STOPPING, True: f"server_stopping: {STOPPING}"}


def test_answers_that_do_not_end_in_time_end_with_a_message_and_the_log_has_no_traceback(
    worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import uvicorn

    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.limits import Limits
    from llava_steering_plugin.serving.http.openai.api import ApiSettings
    from llava_steering_plugin.serving.http.server import Server
    from llava_steering_plugin.serving.worker import bind

    port = free_port()
    app = build(worker, Limits(running=2, batch=1), api=ApiSettings())
    slots = app.state.admission.slots
    config = uvicorn.Config(app, "127.0.0.1", port, log_config=None)
    server = Server(config, slots, grace=0)
    thread = threading.Thread(target=server.run, args=([bind("127.0.0.1", port)],), daemon=True)
    with caplog.at_level(logging.INFO):
        thread.start()
        wait_until(lambda: server.started)
        streams = [Stream(f"http://127.0.0.1:{port}", "cats", openai) for openai in (False, True)]
        answers: list[str] = []
        waiting = threading.Thread(
            target=lambda: answers.append(_whole_answer(f"http://127.0.0.1:{port}", "dogs")), daemon=True
        )
        waiting.start()
        wait_until(lambda: len(slots.waiting) == 1)
        server.should_exit = True
        assert [stream.ended() for stream in streams] == [ENDS[stream.openai] for stream in streams]
        waiting.join(ENDING)
        thread.join(ENDING)
    assert answers == ["503 server_stopping"]
    assert not thread.is_alive() and not slots.running and not slots.waiting
    assert "Exception" not in caplog.text and "Traceback" not in caplog.text


def _whole_answer(address: str, model: str) -> str:
    """The status and code of an answer that is not streamed."""
    body = {"model": model, "messages": [{"role": "user", "content": "What?"}], "max_tokens": LONG}
    response = requests.post(f"{address}/v1/chat/completions", json=body, timeout=PATIENCE)
    return f"{response.status_code} {response.json().get('error', {}).get('code')}"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["worker", "serve"])
def test_a_process_that_gets_sigterm_gives_each_stream_an_end_and_ends_itself_without_a_traceback(
    command: str, tiny: TinyLlava, shelf: Path, patched_llava: Path, tmp_path: Path
) -> None:
    port = free_port()
    adapters = ["--adapters", str(shelf / "cats"), str(shelf / "dogs"), "--device", "cpu"]
    words = {
        "worker": ["llava_steering_plugin.serving.worker", "--model-path", str(tiny.llava), "--no-register"],
        "serve": ["llava_steering_plugin", "serve", str(tiny.llava), "--port", str(free_port())],
    }[command]
    words += ["--port" if command == "worker" else "--worker-port", str(port), *adapters]
    said = tmp_path / "said"
    with said.open("wb") as file, ExitStack() as ending:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=subprocess_environment(patched_llava, {"COLUMNS": "200"}),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        ending.callback(process.wait)
        ending.callback(process.kill)
        up = {"worker": r"serving .*cats", "serve": r"all is up: http"}[command]
        wait_until(lambda: process.poll() is not None or re.search(up, said.read_text()) is not None, 480)
        assert process.poll() is None, said.read_text()[-5000:]
        address = f"http://127.0.0.1:{port}"
        streams = [Stream(address, model, openai) for model in ("cats", "dogs") for openai in (False, True)]
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        for stream in streams:
            assert stream.ended() in ("whole", ENDS[stream.openai])
        status = process.wait(ENDING)
        assert time.monotonic() - told < ENDING
    assert status in {"worker": (0, -signal.SIGTERM), "serve": (0,)}[command], said.read_text()[-5000:]
    assert "Traceback" not in said.read_text(), said.read_text()[-5000:]
