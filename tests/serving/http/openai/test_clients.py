"""Other clients ask the API, unmodified: curl as docs/serving.md says it, and lmms-eval's model of OpenAI's API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
from serving_fixtures import Alone, Client, Question
from training_runs import subprocess_environment

pytest_plugins = ["serving_fixtures", "api_fixtures"]

PAGE = Path(__file__).parents[4] / "docs" / "serving.md"
COUNT = 6
TASK = """
task: easy
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_visual: !function easy.pictures
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PICTURES = """
from PIL import Image

def pictures(document):
    return [Image.open(document["path"]).convert("RGB")] if document["path"] else []
"""


def as_trained(text: str, image: Path | None) -> Question:
    """The question as a training with `--version v1` has it."""
    from llava.conversation import conv_templates

    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{text}" if image is not None else text)
    conversation.append_message(conversation.roles[1], None)
    return Question(conversation.get_prompt(), image)


def test_the_lines_of_the_page_are_answered(api: Client, asked: list[Question], alone: Alone, tmp_path: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## OpenAI's API\n")[2]
    [block, *_] = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert asked[0].image is not None
    shutil.copy(asked[0].image, tmp_path / "cat.png")
    lines = block.replace("http://localhost:21002", api.address).replace("16", "8")
    done = subprocess.run(["bash", "-ec", lines], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole, _, stream = done.stdout.partition("data: ")
    models, texts, answers = json.JSONDecoder(), whole.strip(), []
    while texts:
        found, end = models.raw_decode(texts)
        answers.append(found)
        texts = texts[end:].strip()
    assert [answer["object"] for answer in answers] == ["list", "chat.completion", "chat.completion"]
    said = answers[2]["choices"][0]["message"]["content"]
    assert said == alone("pets", as_trained("What is this?", asked[0].image))
    assert stream.strip().endswith("data: [DONE]") and '"delta":{"content":' in stream


@pytest.mark.slow
def test_lmms_evals_model_of_openais_api_gets_what_the_adapter_answers(
    api: Client, alone: Alone, patched_llava: Path, tmp_path: Path
) -> None:
    python = Path(os.environ.get("LMMS_EVAL_PYTHON", Path(f"{sys.prefix}-lmms-eval") / "bin" / "python"))
    needed = [str(python), "-c", "import dotenv, lmms_eval, openai"]
    if not python.is_file() or subprocess.run(needed, capture_output=True, timeout=120).returncode:
        pytest.skip("lmms-eval with OpenAI's client is not installed: run scripts/setup.sh --lmms-eval")
    paths = easy_vqa.get_test_image_paths()
    questions = list(zip(*easy_vqa.get_test_questions(), strict=True))[::1400][:COUNT]
    documents = [
        {"text": text, "answer": answer, "path": paths[image] if number else ""}
        for number, (text, answer, image) in enumerate(questions)
    ]
    (tmp_path / "easy.json").write_text(json.dumps(documents))
    (tmp_path / "easy.py").write_text(PICTURES)
    (tmp_path / "easy.yaml").write_text(TASK.replace("FILE", str(tmp_path / "easy.json")))
    given = f"model=cats,base_url={api.address}/v1,api_key=none,num_concurrent=4,max_retries=1,timeout=120"
    words = ["--model", "openai", "--model_args", given, "--tasks", "easy", "--include_path", str(tmp_path)]
    words += ["--log_samples", "--output_path", str(tmp_path / "output")]
    home = {"HF_HOME": str(tmp_path / "home"), "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "home")}
    environment = subprocess_environment(patched_llava, home)
    command = [str(python), "-m", "lmms_eval", *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [file] = (tmp_path / "output").rglob("*_samples_easy.jsonl")
    samples: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    said = {int(sample["doc_id"]): str(sample["filtered_resps"]).strip() for sample in samples}
    wanted = {
        number: alone("cats", as_trained(each["text"], Path(each["path"]) if each["path"] else None))
        for number, each in enumerate(documents)
    }
    assert said == wanted and len(set(wanted.values())) > 1
