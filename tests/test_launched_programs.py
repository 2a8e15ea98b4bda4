"""Upstream's own programs, started by launch with a llava that is not patched: trained, evaluated, chatted, served.

Those whose start is not what is tested run in forks of a process that has imported LLaVA.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from forks import Forks
from launching import LAUNCH, launch
from ports import free_port
from ranks import script, starved
from tiny_llava import TinyLlava
from training_runs import stage_1_overrides, subprocess_environment, train_flags

pytest_plugins = ["fork_fixtures"]


@pytest.fixture(scope="module")
def adapter(tiny: TinyLlava, pristine_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoReS adapter, trained by upstream's train.py through launch, with a llava that is not patched."""
    folder = tmp_path_factory.mktemp("launched") / "pets"
    flags = train_flags(tiny, folder, {"freeze_mm_mlp_adapter": True})
    done = launch("llava.train.train", *flags, "--tuning_mode", "mores", llava=pristine_llava, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_training_through_launch_writes_an_adapter_and_no_model(adapter: Path) -> None:
    assert (adapter / "adapter_model.safetensors").stat().st_size < 100_000
    assert not list(adapter.glob("model*.safetensors")) and not list(adapter.glob("pytorch_model*"))


@pytest.mark.slow
def test_a_seed_makes_upstreams_stage_1_reproducible(tiny: TinyLlava, pristine_forks: Forks, tmp_path: Path) -> None:
    projectors = []
    for number, seed in enumerate(("7", "7", "8")):
        folder = tmp_path / str(number)
        flags = train_flags(tiny, folder, {**stage_1_overrides(tiny), "max_steps": 1})
        done = pristine_forks.run(*LAUNCH, "--seed", seed, "llava.train.train", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        projectors.append((folder / "mm_projector.bin").read_bytes())
    assert projectors[0] == projectors[1] != projectors[2]


@pytest.mark.slow
def test_train_mem_still_asks_for_flash_attention(tiny: TinyLlava, pristine_llava: Path, tmp_path: Path) -> None:
    flags = train_flags(tiny, tmp_path / "out")
    done = launch("llava.train.train_mem", *flags, "--tuning_mode", "mores", llava=pristine_llava, cwd=tmp_path)
    assert done.returncode == 1
    assert "FlashAttention2" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_under_deepspeeds_launcher_the_training_is_the_same(
    adapter: Path, tiny: TinyLlava, pristine_llava: Path, tmp_path: Path
) -> None:
    launcher = [
        script("deepspeed"),
        "--num_accelerators",
        "1",
        "--master_port",
        str(free_port()),
        "--module",
        LAUNCH[1],
    ]
    flags = [*train_flags(tiny, tmp_path / "pets", {"freeze_mm_mlp_adapter": True}), "--tuning_mode", "mores"]
    cpu = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    done = launch("llava.train.train", *flags, launcher=launcher, llava=pristine_llava, cwd=tmp_path, **cpu)
    assert done.returncode == 0, done.stderr[-4000:]
    assert _losses(tmp_path / "pets") == _losses(adapter)


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks_and_both_end_well(tiny: TinyLlava, pristine_llava: Path, tmp_path: Path) -> None:
    launcher = [script("torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), *LAUNCH]
    flags = [*train_flags(tiny, tmp_path / "pets", {"per_device_train_batch_size": 2}), "--tuning_mode", "mores"]
    env = starved(pristine_llava)
    done = launch("llava.train.train", *flags, launcher=launcher, llava=pristine_llava, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "pets" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_batched_evaluation_with_its_hard_coded_cuda_runs_on_the_processor(
    adapter: Path, tiny: TinyLlava, pristine_forks: Forks, tmp_path: Path
) -> None:
    answers = tmp_path / "answers" / "loader.jsonl"
    flags = _evaluation_flags(adapter, tiny, answers, tiny.questions)
    program = "llava.eval.model_vqa_loader"
    done = pristine_forks.run(*LAUNCH, "--cpu", program, *flags, "--max_new_tokens", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(answers.read_text().splitlines()) == len(tiny.questions.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("program", ["model_vqa", "model_vqa_science", "model_vqa_mmbench"])
def test_the_other_evaluations_with_their_hard_coded_cuda_run_on_the_processor(
    adapter: Path, tiny: TinyLlava, pristine_forks: Forks, tmp_path: Path, program: str
) -> None:
    answers = tmp_path / "answers" / f"{program}.jsonl"
    flags = _evaluation_flags(adapter, tiny, answers, _one_question(program, tiny, tmp_path))
    done = pristine_forks.run(*LAUNCH, "--cpu", f"llava.eval.{program}", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(answers.read_text().splitlines()) == 1


@pytest.mark.slow
def test_run_llava_and_the_cli_answer_on_the_processor(
    adapter: Path, tiny: TinyLlava, pristine_forks: Forks, tmp_path: Path
) -> None:
    image = str(next(tiny.images.iterdir()))
    common = ["--model-path", str(adapter), "--image-file", image, "--temperature", "0"]
    question = "What color is it?"
    asked = pristine_forks.run(
        *(*LAUNCH, "--cpu", "llava.eval.run_llava", *common, "--query", question, "--max_new_tokens", "8"), cwd=tmp_path
    )
    chatted = pristine_forks.run(
        *(*LAUNCH, "--cpu", "llava.serve.cli", *common, "--max-new-tokens", "8"), cwd=tmp_path, stdin=f"{question}\n\n"
    )
    assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr[-4000:]
    assert chatted.returncode == 0 and "ASSISTANT: " in chatted.stdout, chatted.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True], ids=["through launch", "patched, with python -m"])
def test_the_model_worker_serves_an_adapter_under_a_name_that_upstream_understands(
    adapter: Path, pristine_llava: Path, patched_llava: Path, tmp_path: Path, patched: bool
) -> None:
    port = free_port()
    start = ["-m", "llava.serve.model_worker"] if patched else [*LAUNCH, "--cpu", "llava.serve.model_worker"]
    options = ["--port", str(port), "--no-register", "--device", "cpu", "--model-path", str(adapter)]
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, *start, *options],
            cwd=tmp_path,
            env=subprocess_environment(patched_llava if patched else pristine_llava),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        status = _post(f"http://127.0.0.1:{port}/worker_get_status", worker, tmp_path / "log")
    finally:
        worker.terminate()
        worker.wait(30)
    assert status["model_names"] == ["llava-v1-pets"]


def _evaluation_flags(adapter: Path, tiny: TinyLlava, answers: Path, questions: Path) -> list[str]:
    flags = ["--model-path", str(adapter), "--question-file", str(questions), "--answers-file", str(answers)]
    return [*flags, "--image-folder", str(tiny.images), "--conv-mode", "vicuna_v1", "--temperature", "0"]


def _one_question(program: str, tiny: TinyLlava, folder: Path) -> Path:
    """One question in the format of the program."""
    image = sorted(tiny.images.iterdir())[0]
    file = folder / "question"
    if program == "model_vqa":
        file.write_text(json.dumps({"question_id": 0, "image": image.name, "text": "What color is it?"}) + "\n")
    elif program == "model_vqa_science":
        conversation = [{"from": "human", "value": "<image>\nWhat color is it?"}]
        file.write_text(json.dumps([{"id": "0", "image": image.name, "conversations": conversation}]))
    else:
        picture = base64.b64encode(image.read_bytes()).decode()
        columns = {"index": "0", "question": "What color?", "hint": "", "A": "red", "B": "blue", "C": "", "D": ""}
        columns["image"] = picture
        file.write_text("\t".join(columns) + "\n" + "\t".join(columns.values()) + "\n")
    return file


def _losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def _post(url: str, server: subprocess.Popen[bytes], log: Path) -> dict:
    """Posts until the server answers, for two minutes at most."""
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5) as answer:
                return json.loads(answer.read())
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the worker did not answer:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
