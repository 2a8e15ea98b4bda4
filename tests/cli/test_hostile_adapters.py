"""A hostile or damaged adapter stops worker, chat and eval at their start: one message, status 1 and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from base_folders import adapter_folder, base_folder
from mutated_contents import CONFIG, WEIGHTS, change_json, change_text
from ports import free_port
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin import cli
from llava_steering_plugin.serving import worker


def a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def a_pipe_beside(folder: Path) -> None:
    os.mkfifo(folder / "llava_steering_config.json")


def a_device(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def no_end(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1 << 40)


def config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, CONFIG, change)


def text(value: str) -> Callable[[Path], None]:
    return lambda folder: change_text(folder, CONFIG, lambda _: value)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (a_pipe, "named pipe"),
    "pipe beside the weights": (a_pipe_beside, "named pipe"),
    "device": (a_device, "a device"),
    "no end": (no_end, "1,099,511,627,776 bytes"),
    "no conversation": (config(lambda data: data.pop("conversation")), "conversation is None or missing"),
    "another type": (config(lambda data: data.update(conversation=[])), "conversation is []"),
    "another base": (config(lambda data: data.update(base=[1])), "base is [1]"),
    "infinite": (config(lambda data: data.update(settings={"rank": float("inf")})), "settings.rank is inf"),
    "digits": (text('{"peft_type": ' + "9" * 5000 + "}"), "is not JSON"),
    "deep": (text("[" * 10_000), "is not JSON"),
}


def words(program: str, adapter: Path, base: Path, tiny: TinyLlava) -> list[str]:
    asked = ["--question-file", str(tiny.questions), "--image-folder", str(tiny.images)]
    return {
        "chat": ["chat", str(adapter), "--model-base", str(base)],
        "eval": ["eval", str(base), "--adapter", str(adapter), *asked, "--answers-file", f"{adapter}.jsonl"],
        "worker": ["--model-path", str(base), "--adapters", str(adapter), "--port", str(free_port())],
    }[program] + ["--device", "cpu"]


@pytest.mark.usefixtures("patched_llava")
@pytest.mark.parametrize("program", ["chat", "eval", "worker"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_it_is_one_message_and_a_status(
    tiny: TinyLlava, tmp_path: Path, kind: str, program: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change, expected = HOSTILE[kind]
    adapter = adapter_folder(tmp_path / "pets")
    change(adapter)
    monkeypatch.setattr(sys, "argv", ["program", *words(program, adapter, base_folder(tmp_path / "base"), tiny)])
    with pytest.raises(SystemExit) as ended:
        (worker if program == "worker" else cli).main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("Error: ") == 1 and expected in said and str(adapter) in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("program", ["chat", "eval", "worker"])
def test_so_it_is_in_a_process_of_its_own(tiny: TinyLlava, patched_llava: Path, tmp_path: Path, program: str) -> None:
    adapter = adapter_folder(tmp_path / "pets")
    config(lambda data: data.pop("conversation"))(adapter)
    module = "llava_steering_plugin" + (".serving.worker" if program == "worker" else "")
    done = subprocess.run(
        [sys.executable, "-m", module, *words(program, adapter, base_folder(tmp_path / "base"), tiny)],
        env=subprocess_environment(patched_llava), capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert "conversation is None or missing" in done.stderr and "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("where", ["base", "tower"])
def test_a_pipe_among_the_files_of_the_base_is_said_before_anything_waits_for_it(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, where: str
) -> None:
    from llava_steering_plugin.errors import SteeringError
    from llava_steering_plugin.inference.base_model import load_base

    tower = tmp_path / "tower"
    tower.mkdir()
    base = base_folder(tmp_path / "base", mm_vision_tower=str(tower))
    os.mkfifo((base if where == "base" else tower) / "pytorch_model.bin")
    assert json.loads((base / "config.json").read_text())["mm_vision_tower"] == str(tower)
    with pytest.raises(SteeringError, match=r"holds pytorch_model\.bin, which is no regular file"):
        load_base(str(base), device="cpu")
