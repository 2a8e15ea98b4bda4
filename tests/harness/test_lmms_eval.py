"""The whole of lmms-eval, unmodified, over questions of easy-VQA: its answers are those of `llava-steering eval`.

Covers `harness/model.py`. lmms-eval lies in an environment of its own, which `scripts/setup.sh --lmms-eval` makes;
LMMS_EVAL_PYTHON names another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
import yaml
from evaluating_fixtures import SHORT, Evaluate
from official_sources import make_source
from pooled import BASE
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin.evaluation.preparing import prepare
from llava_steering_plugin.harness import prepared
from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
from llava_steering_plugin.inference.asking.likelihood import likelihoods
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.models import open_model

pytest_plugins = ["evaluating_fixtures", "pooled_fixtures", "steered_fixtures"]
pytestmark = pytest.mark.slow

TASKS = Path(prepared.__file__).parent / "tasks"
COUNT, BATCH = 12, 4
CHOICES = ["yes", "no", "a red circle"]
GENERATED = """
task: easy
output_type: generate_until
doc_to_target: answer
generation_kwargs: {max_new_tokens: %d, temperature: 0, do_sample: false, num_beams: 1, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = f"""
task: easy_choices
output_type: multiple_choice
doc_to_target: place
doc_to_choice: {json.dumps(CHOICES)}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: text
doc_to_visual: !function easy.pictures
"""
PICTURES = """
from PIL import Image

def pictures(document):
    return [Image.open(document["path"])] if document["path"] else []
"""
# lmms-eval's own model of LLaVA always asks for cuda:0.
OWN_MODEL_ON_CPU = """
from llava_steering_plugin.upstream.cuda_to_cpu import redirect_cuda_to_cpu

redirect_cuda_to_cpu()
import lmms_eval.models.simple.llava as own

load = own.load_pretrained_model
own.load_pretrained_model = lambda *args, **kwargs: load(*args, **{**kwargs, "device_map": "cpu", "device": "cpu"})
from lmms_eval.cli.dispatch import main

main()
"""


@pytest.fixture(scope="module")
def python() -> str:
    """The Python that has lmms-eval."""
    beside = Path(f"{sys.prefix}-lmms-eval") / "bin" / "python"
    found = Path(os.environ.get("LMMS_EVAL_PYTHON", beside))
    if not found.is_file():
        pytest.skip(f"lmms-eval is not installed: `scripts/setup.sh --lmms-eval` puts it into {beside.parents[1]}")
    return str(found)


@pytest.fixture(scope="module")
def environment(patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    scratch = tmp_path_factory.mktemp("lmms-eval-home")
    return subprocess_environment(patched_llava, {"HF_HOME": str(scratch), "LMMS_EVAL_DATASETS_CACHE": str(scratch)})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks over easy-VQA: questions with a picture, and one without."""
    folder = tmp_path_factory.mktemp("tasks")
    paths = easy_vqa.get_test_image_paths()
    asked = list(zip(*easy_vqa.get_test_questions(), strict=True))[::700][:COUNT]
    documents = [
        {"text": text, "answer": answer, "place": number % len(CHOICES), "path": paths[image] if number else ""}
        for number, (text, answer, image) in enumerate(asked)
    ]
    assert len(documents) == COUNT
    (folder / "easy.json").write_text(json.dumps(documents))
    (folder / "easy.py").write_text(PICTURES)
    common = COMMON.replace("FILE", str(folder / "easy.json"))
    (folder / "easy.yaml").write_text(GENERATED % SHORT + common)
    (folder / "easy_choices.yaml").write_text(CHOSEN + common)
    return folder


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"*_samples_{task}.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: int(sample["doc_id"]))


def results_of(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("*_results.json")
    return dict(json.loads(file.read_text())["results"])


def answered(folder: Path) -> list[str]:
    return [sample["filtered_resps"] for sample in samples_of(folder, "easy")]


def asked(evaluate: Evaluate, local: Path, adapters: Sequence[str], batch: int) -> dict[str, list[str]]:
    """What `llava-steering eval` answers to the questions of `local`, by adapter."""
    documents = json.loads((local / "easy.json").read_text())
    questions = [
        {
            "question_id": n,
            "text": each["text"],
            "adapter": adapter,
            **({"image": each["path"]} if each["path"] else {}),
        }
        for adapter in adapters
        for n, each in enumerate(documents)
    ]
    found = evaluate(questions, "--batch-size", str(batch), images=Path("/"))
    return {name: [each["text"] for each in found if each["model_id"] == name] for name in adapters}


def test_base_mores_and_mixlora_answer_as_by_eval(
    python: str,
    environment: dict[str, str],
    local: Path,
    tiny: TinyLlava,
    folders: dict[str, Path],
    evaluate: Evaluate,
    tmp_path: Path,
) -> None:
    prepare("mnist", make_source("mnist", tmp_path / "mnist"), tmp_path / "data", split="test")
    models = {
        BASE: f"base={tiny.llava}",
        "cats": f"adapter={folders['cats']},base={tiny.llava}",
        "pets": f"adapter={folders['pets']},base={tiny.llava},device=cpu",
    }
    runs = [
        {
            "model": "llava_steering",
            "model_args": words,
            "tasks": "easy,easy_choices,mnist" if name == "cats" else "easy",
            "include_path": [str(local), str(TASKS)],
            "batch_size": BATCH,
            "device": "cpu",
            "log_samples": True,
            "output_path": str(tmp_path / name),
        }
        for name, words in models.items()
    ]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(runs))
    command = [python, "-m", "lmms_eval", "--config", str(tmp_path / "runs.yaml")]
    extra = {"LLAVA_STEERING_DATA": str(tmp_path / "data")}
    done = subprocess.run(command, env=environment | extra, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    expected = asked(evaluate, local, tuple(models), BATCH)
    assert {name: answered(tmp_path / name) for name in models} == expected
    assert len({str(each) for each in expected.values()}) == 3, "an adapter that changes nothing proves nothing"

    documents = json.loads((local / "easy.json").read_text())
    opened = open_model(str(folders["cats"]), str(tiny.llava), {"device": "cpu"})
    answers = BatchAnswers(opened.loaded, Path("/"), AnswerOptions(BATCH, None, {}))
    right = 0
    for number, (document, sample) in enumerate(
        zip(documents, samples_of(tmp_path / "cats", "easy_choices"), strict=True)
    ):
        images = (document["path"],) if document["path"] else ()
        choices = [(Question(number, document["text"], images, opened.adapter), choice) for choice in CHOICES]
        likely = [each.logarithm for each in likelihoods(answers, choices)]
        assert [-float(each[0]) for each in sample["filtered_resps"]] == pytest.approx(likely, abs=0.1)  # float16
        right += max(range(3), key=likely.__getitem__) == document["place"]
    found = results_of(tmp_path / "cats")
    assert found["easy_choices"]["acc,none"] == pytest.approx(right / COUNT)

    items = [sample["accuracy"] for sample in samples_of(tmp_path / "cats", "mnist")]
    assert len(items) == 2 and found["mnist"]["accuracy,none"] == prepared.accuracy(items)


def test_lmms_evals_own_model_of_llava_takes_an_adapter_too(
    python: str,
    environment: dict[str, str],
    local: Path,
    tiny: TinyLlava,
    folders: dict[str, Path],
    evaluate: Evaluate,
    tmp_path: Path,
) -> None:
    """Its first try to load fails, on purpose, inside transformers, which then leaves float16 as the default dtype."""
    given = f"pretrained={folders['cats']},conv_template=llava_v1"
    words = ["--model", "llava", "--model_args", given, "--tasks", "easy", "--include_path", str(local)]
    logged = ["--log_samples", "--output_path", str(tmp_path / "own")]
    command = [python, "-c", OWN_MODEL_ON_CPU, *words, *logged]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [text.strip() for text in answered(tmp_path / "own")] == asked(evaluate, local, ("cats",), 1)["cats"]


def test_a_model_that_cannot_be_loaded_ends_lmms_eval_with_an_error(
    python: str, environment: dict[str, str], local: Path, tiny: TinyLlava, tmp_path: Path
) -> None:
    given = f"base={tiny.llava},adapter={tmp_path / 'nowhere'},conversation=v9"
    words = ["--model", "llava_steering", "--model_args", given, "--tasks", "easy", "--include_path", str(local)]
    command = [python, "-m", "lmms_eval", *words, "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert "nowhere is no folder" in done.stderr and "unknown conversation template 'v9'" in done.stderr
    assert "Traceback" not in done.stderr
