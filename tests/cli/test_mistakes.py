"""Two mistakes in one command are both named in one message: serve, worker, chat (`chat/preflight.py`), convert
and diagnose (`diagnostics/preflight.py`).

The test of eval is tests/inference/asking/test_questions.py.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from base_folders import adapter_folder, base_folder
from ports import free_port
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError, BaseMismatch, Problems, SteeringError

# What is wrong, and a part of what is said. {here} is the test's folder.
Mistakes = Mapping[str, tuple[dict[str, Any], str]]
OF_THE_SERVER: Mistakes = {
    "base": ({"base": "{here}/nowhere"}, "there is no folder {here}/nowhere"),
    "adapter": ({"adapters": ["x=/nope"]}, "/nope is no folder"),
    "name": ({"more_adapters": ["two words={here}/pets"]}, "'two words' cannot be the name"),
    "folder": ({"adapter_dir": Path("/no-shelf")}, "--adapter-dir /no-shelf is no folder"),
    "device": ({"device": "gpu"}, "--device gpu: torch knows no such device"),
    "bits": ({"load_4bit": True, "load_8bit": True}, "exclude each other"),
    "allowed host": ({"allowed_host": ["http://x/", "a b"]}, "--allowed-host a b"),
    "token": ({"admin_token": "secret"}, "needs 16 at least"),
    "seconds": ({"watch_every": float("nan")}, "--watch-every nan"),
    "port": ({"worker_port": "{taken}"}, "the worker cannot listen on 127.0.0.1:{taken}"),
    "host": ({"host": "192.0.2.1"}, "the page cannot listen on 192.0.2.1"),
}
OF_THE_WORKER: Mistakes = {
    **{
        name: OF_THE_SERVER[name]
        for name in ("base", "adapter", "name", "folder", "device", "bits", "token", "seconds")
    },
    "port": ({"port": "{taken}"}, ":{taken}: [Errno 98]"),
    "address": ({"host": "0.0.0.0"}, "give this machine's with --worker-address"),
}
OF_A_CHAT: Mistakes = {
    "base": ({"path": "{here}/nowhere"}, "{here}/nowhere is no model that can be loaded"),
    "adapter": ({"more": ["x=/nope"]}, "/nope is no folder"),
    "image": ({"image": "{here}/nowhere.png"}, "there is no file {here}/nowhere.png"),
    "device": ({"device": "gpu"}, "--device gpu"),
    "bits": ({"load_4bit": True, "load_8bit": True}, "exclude each other"),
    "template": ({"conversation": "klingon"}, "unknown conversation template 'klingon'"),
}
OF_A_DIAGNOSIS: Mistakes = {
    "model": ({"models": ["{here}/pets", "x=/nope"]}, "/nope"),
    "output": ({"--output": "{here}/base/config.json/out"}, "--output {here}/base/config.json/out cannot be written"),
    "device": ({"--device": "gpu"}, "--device gpu"),
    "bits": ({"--load-4bit": None, "--load-8bit": None}, "exclude each other"),
}
OF_MODALITY: Mistakes = {
    **OF_A_DIAGNOSIS,
    "questions": ({"--question-file": "{here}/no.jsonl"}, "the questions in {here}/no.jsonl cannot be read"),
    "image": ({"--question-file": "{here}/lost.jsonl"}, "there is no image lost.png"),
    "answers": ({"--answers-file": "{here}/no.jsonl"}, "the answers in {here}/no.jsonl cannot be read"),
    "template": ({"--conv-mode": "klingon"}, "unknown conversation template 'klingon'"),
    "other base": ({"--model-base": "{here}/other"}, "was trained on"),
    "adapter as base": ({"--model-base": "{here}/pets"}, "{here}/pets is an adapter, no base"),
}
OF_INTERFERENCE: Mistakes = {
    **OF_A_DIAGNOSIS,
    "data": ({"--data": "{here}/no.json"}, "the data in {here}/no.json cannot be read"),
    "template": ({"--version": "klingon"}, "unknown conversation template 'klingon'"),
    "other base": ({"--model-base": "{here}/other"}, "was trained on"),
}
OF_STEERING: Mistakes = {**OF_MODALITY, "mode": ({"models": ["{here}/mixed"]}, "use `llava-steering diagnose routing`")}
OF_ROUTING: Mistakes = {
    **OF_INTERFERENCE,
    "mode": ({"models": ["{here}/pets"]}, "use `llava-steering diagnose steering`"),
}
OF_AN_IMAGE: Mistakes = {
    **OF_A_DIAGNOSIS,
    "model": ({"models": ["/nope"]}, "/nope"),
    "image": ({"--image": "{here}/no.png"}, "there is no file {here}/no.png"),
    "question": ({"--question": " "}, "--question is empty"),
    "answer": ({"--answer": ""}, "--answer is empty"),
    "effect": ({"--effect": "occlusoin"}, "--effect occlusoin: did you mean 'occlusion'?"),
    "template": ({"--conv-mode": "klingon"}, "unknown conversation template 'klingon'"),
    "other base": ({"--model-base": "{here}/other", "models": ["{here}/pets"]}, "was trained on"),
}
OF_A_CONVERSION: Mistakes = {
    "source": ({"source": "{here}/nowhere"}, "{here}/nowhere"),
    "target": ({"target": "{here}/pets"}, "pets is not empty"),
    "base": ({"base": "no/such-base"}, "no/such-base"),
}


@pytest.fixture
def here(tmp_path: Path, patched_llava: Path) -> Path:
    base_folder(tmp_path / "base")
    adapter_folder(tmp_path / "pets")
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def check_all_pairs(
    mistakes: Mistakes, right: dict[str, Any], check: Callable[[dict[str, Any]], object], here: Path, taken: int = 0
) -> None:
    """Make every two mistakes at once that do not need the same option; both have to be named."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(each) for each in value]
        if value == "{taken}":
            return taken
        return value.format(here=here) if isinstance(value, str) else value

    pairs = 0
    for (one, (first, said)), (other, (second, also)) in itertools.combinations(mistakes.items(), 2):
        if first.keys() & second.keys():
            continue
        given = {name: filled(value) for name, value in (right | first | second).items()}
        with pytest.raises(SteeringError) as refused:
            check(given)
        for expected in (said, also):
            assert expected.format(here=here, taken=taken) in str(refused.value), (one, other)
        pairs += 1
    assert pairs >= 3


def test_serve_names_every_two_mistakes(here: Path, taken: int) -> None:
    from llava_steering_plugin.serving.options import ServeOptions
    from llava_steering_plugin.serving.preflight import check_server

    check_all_pairs(
        OF_THE_SERVER, {"base": "{here}/base"}, lambda options: check_server(ServeOptions(**options)), here, taken
    )


def test_the_worker_names_every_two_mistakes(here: Path, taken: int) -> None:
    from llava_steering_plugin.serving.options import WorkerOptions
    from llava_steering_plugin.serving.worker import run

    def check(options: dict[str, Any]) -> None:
        run(WorkerOptions(**({"model_path": options.pop("base"), "port": free_port()} | options)))

    check_all_pairs(OF_THE_WORKER, {"base": "{here}/base"}, check, here, taken)


def test_a_chat_names_every_two_mistakes(here: Path) -> None:
    from llava_steering_plugin.chat.preflight import check_chat

    right = {"path": "{here}/base", "more": [], "base": None, "image": None, "device": "auto", "conversation": None}
    right |= {"load_4bit": False, "load_8bit": False}
    check_all_pairs(OF_A_CHAT, right, lambda options: check_chat(**options), here)


def test_a_chat_with_an_adapter_names_its_lost_base_and_what_else_is_wrong(here: Path) -> None:
    from llava_steering_plugin.chat.preflight import check_chat

    none = {"base": None, "device": "auto", "conversation": None, "load_4bit": False, "load_8bit": False}
    with pytest.raises(SteeringError, match=r"(?s)there is no file .*say where it is with --model-base"):
        check_chat(str(here / "pets"), [], image=str(here / "nowhere.png"), **none)


def test_an_adapter_in_the_place_of_its_base_is_named_before_anything_is_loaded(here: Path) -> None:
    from llava_steering_plugin.chat.preflight import check_chat

    said = f"{here}/pets is an adapter, no base"
    none = {"image": None, "device": "auto", "conversation": None, "load_4bit": False, "load_8bit": False}
    with pytest.raises(ArgumentsError, match=said):
        check_chat(str(here / "pets"), [], base=str(here / "pets"), **none)
    (here / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "What?"}))
    files = ["--question-file", f"{here}/q.jsonl", "--image-folder", str(here), "--answers-file", f"{here}/a.jsonl"]
    result = CliRunner().invoke(app, ["eval", str(here / "pets"), *files])
    assert isinstance(result.exception, ArgumentsError)
    assert said in str(result.exception)


def test_a_conversion_names_every_two_mistakes(here: Path) -> None:
    from llava_steering_plugin.convert.conversion import convert

    right = {"source": "{here}/base", "target": "{here}/new", "base": None}
    check_all_pairs(OF_A_CONVERSION, right, lambda options: convert(**options), here)


@pytest.mark.parametrize(
    ("measure", "mistakes"),
    [
        ("modality", OF_MODALITY),
        ("interference", OF_INTERFERENCE),
        ("steering", OF_STEERING),
        ("routing", OF_ROUTING),
    ],
)
def test_a_diagnosis_names_every_two_mistakes(
    measure: str, mistakes: Mistakes, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.diagnostics.interference import run as task_runs
    from llava_steering_plugin.diagnostics.modality import run as runs
    from llava_steering_plugin.diagnostics.routing import run as routing_runs
    from llava_steering_plugin.diagnostics.steering import run as steering_runs

    monkeypatch.setattr(runs, "open_model", lambda *_: pytest.fail("a model was loaded"))
    for module in (task_runs, steering_runs, routing_runs):
        monkeypatch.setattr(module, "open_tunable", lambda *_: pytest.fail("a model was loaded"))
    adapter_folder(here / "mixed", mode="mixlora")
    base_folder(here / "other", hidden_size=32)
    (here / "a.png").touch()
    for file, image in (("q.jsonl", "a.png"), ("lost.jsonl", "lost.png")):
        (here / file).write_text(json.dumps({"question_id": 1, "text": "What?", "image": image}))
    sample = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    (here / "data.json").write_text(json.dumps([sample | {"task": task} for task in "aabb"]))
    right = {
        "models": ["{here}/mixed" if measure == "routing" else "{here}/pets"],
        "--image-folder": "{here}",
        "--output": "{here}/out",
        "--model-base": "{here}/base",
    }
    asks = measure in ("modality", "steering")
    right |= {"--question-file": "{here}/q.jsonl"} if asks else {"--data": "{here}/data.json"}

    def check(options: dict[str, Any]) -> None:
        words = options.pop("models")
        flags = [word for flag, value in options.items() for word in (flag, value) if word is not None]
        result = CliRunner().invoke(app, ["diagnose", measure, *words, *flags])
        assert result.exception is not None, result.output
        raise result.exception

    check_all_pairs(mistakes, right, check, here)


def test_a_diagnosis_of_an_image_names_every_two_mistakes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from llava_steering_plugin.diagnostics.image import run as image_runs

    monkeypatch.setattr(image_runs, "open_model", lambda *_: pytest.fail("a model was loaded"))
    base_folder(here / "other", hidden_size=32)
    Image.new("RGB", (8, 8)).save(here / "a.png")
    right = {
        "models": ["{here}/pets"],
        "--image": "{here}/a.png",
        "--question": "What?",
        "--output": "{here}/out",
        "--model-base": "{here}/base",
    }

    def check(options: dict[str, Any]) -> None:
        words = options.pop("models")
        flags = [word for flag, value in options.items() for word in (flag, value) if word is not None]
        result = CliRunner().invoke(app, ["diagnose", "image", *words, *flags])
        assert result.exception is not None, result.output
        raise result.exception

    check_all_pairs(OF_AN_IMAGE, right, check, here)


def test_page_and_controller_name_all_hosts_that_are_none() -> None:
    from llava_steering_plugin.serving import controller, page

    for program in (page, controller):
        with pytest.raises(ArgumentsError, match=r"(?s)--allowed-host http://x/: .*--allowed-host a b: "):
            program.main(["--allowed-host", "http://x/", "--allowed-host=a b"])


def test_one_problem_is_raised_as_it_is_and_several_as_the_kind_that_they_share() -> None:
    """`errors.py`: Problems."""
    for kinds, shared in (
        ([BaseMismatch], BaseMismatch),
        ([ArgumentsError, ArgumentsError], ArgumentsError),
        ([ArgumentsError, BaseMismatch], SteeringError),
    ):
        problems = Problems()
        for number, kind in enumerate(kinds):
            with problems.noted():
                raise kind(f"problem {number}:\n  - a part")
        with pytest.raises(SteeringError) as refused:
            problems.raise_any("it cannot be done")
        assert type(refused.value) is shared
        assert all(f"problem {number}" in str(refused.value) for number in range(len(kinds)))
    with pytest.raises(KeyError), Problems().noted():
        raise KeyError
    Problems().raise_any("nothing is wrong")
