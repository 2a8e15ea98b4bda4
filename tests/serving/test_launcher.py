"""`llava-steering serve`: upstream's controller, our worker and upstream's web page as processes, from start to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from PIL import Image
from ports import free_port
from serving_fixtures import Alone, Client, Question
from tiny_language_models import FAMILIES, build
from tiny_llava import TinyLlava
from tiny_towers import TinyTowers
from training_runs import subprocess_environment, train_flags, train_in_process

from llava_steering_plugin.serving.launcher import hints
from llava_steering_plugin.serving.options import ServeOptions

pytest_plugins = ["serving_fixtures", "component_fixtures"]

PATIENCE = 480  # for a machine with much else to do


class Served:
    """A running `llava-steering serve` and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path):
        self.process = process
        self._output = output

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.output)) is None:
            assert self.process.poll() is None and time.monotonic() < end, self.output[-6000:]
            time.sleep(0.2)
        return found

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def serving(llava: Path, folder: Path, *words: str) -> Iterator[Served]:
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "llava_steering_plugin", "serve", *words],
            cwd=folder,
            env=subprocess_environment(llava, {"COLUMNS": "200", "LLAVA_STEERING_ADMIN_TOKEN": "0123456789abcdef"}),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    served = Served(process, output)
    children: list[psutil.Process] = []
    try:
        yield served
    finally:
        if process.poll() is None:
            children = served.children()
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        for child in children:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"host": "0.0.0.0"}, "open the page"),
        ({"api_host": "[::]"}, "ask the API"),
        ({"host": "::", "api_host": "0.0.0.0"}, "open the page, ask the API"),
        ({"host": "0.0.0.0", "api_host": "0.0.0.0", "allowed_host": ["gpu-3.example"]}, ""),
    ],
)
def test_a_server_that_is_open_to_others_says_what_it_has_to_know_of_its_names(
    options: dict[str, Any], said: str
) -> None:
    found = hints(ServeOptions(base="base", **options))
    flag = " under another name than localhost, give that with --allowed-host"
    assert found == [f"to {what}{flag}" for what in said.split(", ") if what]


@pytest.mark.slow
def test_one_command_brings_up_all_three_answers_with_every_adapter_and_stops_cleanly(
    tiny: TinyLlava,
    shelf: Path,
    patched_llava: Path,
    tmp_path: Path,
    alone: Alone,
    asked: list[Question],
) -> None:
    words = [str(tiny.llava), "--adapters", str(shelf / "cats"), f"mine={shelf / 'dogs'}", "--device", "cpu"]
    words.append("--admin-any-path")
    with serving(patched_llava, tmp_path, *words, "--adapter-dir", str(shelf), "--port", str(free_port())) as served:
        # "cats" is given twice: by the flag and by the folder. The second takes the place of the first.
        page = served.wait_for(r"all is up: (http\S+)")[1]
        assert requests.get(page, timeout=60).ok
        assert "mixl.ora-x" in json.dumps(requests.get(f"{page}/config", timeout=60).json())
        controller = served.wait_for(r"controller \|.*running on (http://127\.0\.0\.1:\d+)")[1]
        listed = requests.post(f"{controller}/list_models", timeout=60).json()["models"]
        assert {"llava-v1.5-tiny", "cats", "mine", "routed"} <= set(listed)
        address = requests.post(f"{controller}/get_worker_address", json={"model": "mine"}, timeout=60).json()[
            "address"
        ]
        worker = Client(address)
        assert worker.answer("mine", asked[0]) == alone("dogs", asked[0])
        assert worker.answer("cats", asked[0]) == alone("cats", asked[0])
        assert worker.admin("GET", token="0123456789abcdef").ok
        # Relative to where `serve` was started; its worker runs elsewhere.
        more = {"name": "more", "path": os.path.relpath(shelf / "fish", tmp_path)}
        loaded = worker.admin("POST", token="0123456789abcdef", json=more)
        assert loaded.ok, loaded.text

        children = served.children()
        assert len(children) >= 3
        assert not any("0123456789abcdef" in " ".join(child.cmdline()) for child in children)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(PATIENCE) == 0
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        for url in (page, controller, address):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0, f"{url} still listens"
        assert [path.name for path in tmp_path.iterdir()] == ["output"], "something was left in the folder"
        for part in ("controller", "worker", "page"):
            assert re.search(rf"^ *{part} \| ", served.output, re.MULTILINE)
        assert "Traceback" not in served.output


@pytest.mark.slow
def test_when_one_ends_it_is_said_which_and_why_and_the_others_are_stopped(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny.llava, tmp_path / "broken")
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with serving(patched_llava, tmp_path, str(broken), "--device", "cpu") as served:
        served.wait_for("starting the worker")
        children = served.children()
        assert served.process.wait(PATIENCE) == 1
        said = served.output.rpartition("ProgramDied: ")[2]
        assert said.startswith("the worker has ended with status 1")
        assert "broken cannot be loaded" in said
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_port_that_is_taken_is_said_before_anything_is_started(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(tiny.llava), "--worker-port", str(taken.getsockname()[1])]
        with serving(patched_llava, tmp_path, *words) as served:
            assert served.process.wait(60) == 1
            assert re.search(r"the worker cannot listen on .*in use. Give another --worker-port", served.output)
            assert "starting" not in served.output


@pytest.mark.slow
def test_a_qwen2_that_sees_by_siglip_and_a_pooling_connector_is_served_with_its_adapter(
    tiny: TinyLlava, towers: TinyTowers, patched_llava: Path, tmp_path: Path
) -> None:
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    (family,) = (each for each in FAMILIES if each.name == "qwen2")
    base, adapter = tmp_path / "llava-of-parts", tmp_path / "pets"
    parts = {"version": family.version, "vision_tower": towers.siglip, "mm_projector_type": "avgpool", "max_steps": 1}
    plain = {"model_name_or_path": build(family, tiny, tmp_path / "qwen2")}
    train_in_process(train_flags(tiny, base, {**parts, **plain}))
    mores = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all", "learning_rate": 0.1, "max_steps": 4}
    train_in_process(train_flags(tiny, adapter, {**parts, "model_name_or_path": base, **mores}))

    chat = conv_templates[family.version].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat color is the circle?")
    chat.append_message(chat.roles[1], None)
    question = Question(chat.get_prompt(), sorted(tiny.images.iterdir())[0])

    def alone(path: Path) -> str:
        tokenizer, model, processor, _ = load_pretrained_model(str(path), None, "any", device="cpu")
        pixels = process_images([Image.open(question.image).convert("RGB")], processor, model.config).half()
        ids = tokenizer_image_token(question.prompt, tokenizer, return_tensors="pt")[None]
        with torch.inference_mode():
            made = model.generate(ids, images=pixels, max_new_tokens=question.tokens, do_sample=False)
        return str(tokenizer.decode(made[0], skip_special_tokens=True)).strip()

    words = [str(base), "--adapters", str(adapter), "--device", "cpu"]
    with serving(patched_llava, tmp_path, *words) as served:
        served.wait_for(r"all is up: (http\S+)")
        controller = served.wait_for(r"controller \|.*running on (http://127\.0\.0\.1:\d+)")[1]
        listed = requests.post(f"{controller}/list_models", timeout=60).json()["models"]
        (pets,) = (name for name in listed if name.endswith("pets"))
        (bare,) = (name for name in listed if name.endswith("llava-of-parts"))
        address = requests.post(f"{controller}/get_worker_address", json={"model": pets}, timeout=60).json()["address"]
        worker = Client(address)
        assert worker.answer(pets, question) == alone(adapter)
        assert worker.answer(bare, question) == alone(base)
    assert alone(adapter) != alone(base)
    assert "Traceback" not in served.output
