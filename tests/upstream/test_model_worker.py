"""Upstream's controller and model worker, as processes, with an adapter: what the web page shows its users."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from asking import Asker, Question
from ports import free_port
from served import Served
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

PATIENCE = 300  # seconds, for a worker on a busy machine
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class WebDemo:
    """Addresses of a running controller and a worker that has registered there."""

    controller: str
    worker: str

    def models(self) -> list[str]:
        return list(requests.post(f"{self.controller}/list_models", timeout=PATIENCE).json()["models"])

    def answer(self, model: str, prompt: str, images: list[str]) -> str:
        """The last state of the stream, without the prompt; sent the way the web page sends it."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "temperature": 0.0,
            "top_p": 1.0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "stop": "</s>",
            "images": images,
        }
        response = requests.post(f"{self.worker}/worker_generate_stream", json=body, stream=True, timeout=PATIENCE)
        chunks = [json.loads(chunk) for chunk in response.iter_lines(decode_unicode=False, delimiter=b"\0") if chunk]
        assert [chunk["error_code"] for chunk in chunks] == [0] * len(chunks), chunks[-1]
        assert len(chunks) > 1, "the answer came in one piece, not as a stream"
        return str(chunks[-1]["text"]).removeprefix(prompt).strip()


@pytest.fixture(scope="module")
def demo(served: Served, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDemo]:
    folder = tmp_path_factory.mktemp("worker")
    controller, worker = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    environment = subprocess_environment(patched_llava)
    commands = [
        ["llava.serve.controller", "--host", "127.0.0.1", "--port", controller.rpartition(":")[2]],
        [
            *("llava.serve.model_worker", "--host", "127.0.0.1", "--port", worker.rpartition(":")[2]),
            *("--worker-address", worker, "--controller-address", controller),
            *("--device", "cpu", "--model-path", served.named("mixlora-x")),
        ],
    ]
    processes, logs = [], []
    try:
        for command, address in zip(commands, (controller, worker), strict=True):
            logs.append(folder / f"{command[0]}.output")
            with logs[-1].open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            processes.append(process)
            # The worker registers once, when it starts: the controller has to be there by then.
            _wait_for(address, process, logs[-1])
        yield WebDemo(controller, worker)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


@pytest.mark.slow
def test_the_controller_lists_the_adapter_under_its_readable_name(demo: WebDemo) -> None:
    assert demo.models() == ["llava-v1-mixl.ora-x"]


@pytest.mark.slow
def test_the_worker_streams_the_answers_of_the_python_api_also_to_several_users_at_once(
    demo: WebDemo, ask: Asker, served: Served, questions: list[Question], tiny: TinyLlava
) -> None:
    # Among them one without an image: in its thread nothing of the others may be seen as visual.
    asked = [*questions[:3], Question(questions[0].text, None)]
    [model] = demo.models()
    with ThreadPoolExecutor(len(asked)) as users:
        answers = list(
            users.map(lambda question: demo.answer(model, ask.prompt(question), _encoded(question, tiny)), asked)
        )
    assert answers == [ask(served.adapter, question, max_new_tokens=MAX_NEW_TOKENS) for question in asked]
    unsteered = [ask(served.base, question, max_new_tokens=MAX_NEW_TOKENS) for question in asked]
    assert [answer != other for answer, other in zip(answers, unsteered, strict=True)] == [True, True, True, False]


def _encoded(question: Question, tiny: TinyLlava) -> list[str]:
    return [base64.b64encode((tiny.images / question.image).read_bytes()).decode()] if question.image else []


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    host, _, port = address.removeprefix("http://").partition(":")
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"{log.stem} did not start:\n{log.read_text()[-4000:]}", pytrace=False)
