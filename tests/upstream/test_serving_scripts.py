"""Upstream's own programs, unchanged, with an adapter as --model-path: they answer what the Python API answers.

The folders have names that upstream's rules would misread. Some programs get the base by --model-base, under a path
that the adapter does not know; the others leave it to the adapter.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import Asker, Question
from forks import Forks
from served import MISLEADING_NAMES, Served
from tiny_llava import TinyLlava

pytest_plugins = ["fork_fixtures"]

SHORT = 16
LONGEST = 1024  # what those of the eval scripts ask for that have no flag for it

Ended = subprocess.CompletedProcess[str]
Start = Callable[..., "Future[Ended]"]
Programs = dict[str, "Future[Ended]"]


@pytest.fixture(scope="module")
def start(patched_forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a program over the patched llava; two at a time, the others wait their turn."""
    cwd = tmp_path_factory.mktemp("programs")
    with ThreadPoolExecutor(2) as pool:

        def start(*words: str, stdin: str = "") -> Future[Ended]:
            return pool.submit(patched_forks.run, *words, cwd=cwd, stdin=stdin)

        yield start


@pytest.fixture(scope="module")
def programs(
    start: Start,
    served: Served,
    tiny: TinyLlava,
    questions: list[Question],
    tmp_path_factory: pytest.TempPathFactory,
) -> Programs:
    """All programs that run to an end, started at once; each test waits for its own."""
    files = tmp_path_factory.mktemp("eval")
    first, image = questions[0], str(tiny.images / str(questions[0].image))
    _write_science_questions(files / "science.json", questions)
    _write_mmbench_questions(files / "mmbench.tsv", questions[1], tiny.images)

    def evaluate(script: str, adapter: str, question_file: Path, *words: str) -> Future[Ended]:
        answers = str(files / f"{script}-answers.jsonl")
        return start(
            *("-m", "llava_steering_plugin.launch", "--cpu", f"llava.eval.{script}"),
            *("--model-path", served.named(adapter), "--image-folder", str(tiny.images)),
            *("--question-file", str(question_file), "--answers-file", answers),
            *("--conv-mode", "vicuna_v1", "--temperature", "0", *words),
        )

    return {
        "cli": start(
            *("-m", "llava.serve.cli", "--device", "cpu", "--model-path", served.named("my-mpt")),
            *("--image-file", image, "--temperature", "0", "--max-new-tokens", str(SHORT), "--debug"),
            stdin=f"{first.text}\nThank you.\n\n",
        ),
        "run_llava": start(
            *("-m", "llava_steering_plugin.launch", "--cpu", "llava.eval.run_llava"),
            *("--model-path", served.named("mixlora-x"), "--model-base", served.moved_base, "--image-file", image),
            *("--query", first.text, "--temperature", "0", "--max_new_tokens", str(SHORT)),
        ),
        "model_vqa": evaluate("model_vqa", "my-mpt", tiny.questions, "--model-base", served.moved_base),
        "model_vqa_loader": evaluate("model_vqa_loader", "plain", tiny.questions, "--max_new_tokens", str(SHORT)),
        "model_vqa_science": evaluate("model_vqa_science", "mixlora-x", files / "science.json"),
        "model_vqa_mmbench": evaluate("model_vqa_mmbench", "over-plain-llm", files / "mmbench.tsv"),
    }


@pytest.mark.parametrize("with_base", [False, True], ids=["own base", "model_base"])
@pytest.mark.parametrize("name", MISLEADING_NAMES)
def test_the_name_of_the_folder_and_the_place_of_the_base_do_not_change_the_answer(
    ask: Asker, served: Served, questions: list[Question], name: str, with_base: bool
) -> None:
    answer = ask(served.named(name), questions[0], base=served.moved_base if with_base else None)
    assert answer == ask(served.adapter, questions[0])
    assert answer != ask(served.base, questions[0]), "the adapter changes nothing, so nothing is shown"


@pytest.mark.slow
def test_the_cli_chats_with_the_adapter_over_two_turns(
    programs: Programs, ask: Asker, served: Served, questions: list[Question]
) -> None:
    output = _output(programs["cli"])
    answers = [answer.strip() for answer in re.findall("^USER: ASSISTANT: (.*)$", output, re.MULTILINE)]
    # --debug shows the prompts. What the chat makes of its first answer in the second one differs between versions.
    prompts = [
        ast.literal_eval(line.strip())["prompt"] for line in output.splitlines() if line.startswith(" {'prompt'")
    ]
    assert prompts[0] == ask.prompt(questions[0], "llava_v1")
    assert len(prompts) == 2
    image = questions[0].image
    assert answers == [ask.complete(served.adapter, prompt, image) for prompt in prompts]
    assert answers[0] != ask(served.base, questions[0], conversation="llava_v1")


@pytest.mark.slow
def test_run_llava_answers_with_the_adapter(
    programs: Programs, ask: Asker, served: Served, questions: list[Question]
) -> None:
    answer = _output(programs["run_llava"]).splitlines()[-1]
    assert answer == ask(served.adapter, questions[0], conversation="llava_v1")
    assert answer != ask(served.base, questions[0], conversation="llava_v1")


@pytest.mark.slow
def test_model_vqa_answers_with_the_adapter(
    programs: Programs, ask: Asker, served: Served, questions: list[Question]
) -> None:
    answers = _answers(programs["model_vqa"])
    assert answers == [ask(served.adapter, question, max_new_tokens=LONGEST) for question in questions]
    assert answers != [ask(served.base, question, max_new_tokens=LONGEST) for question in questions]


@pytest.mark.slow
def test_model_vqa_loader_keeps_the_template_it_is_told_for_an_adapter_called_plain(
    programs: Programs, ask: Asker, served: Served, questions: list[Question]
) -> None:
    answers = _answers(programs["model_vqa_loader"])
    assert answers == [ask(served.adapter, question) for question in questions]
    assert answers != [ask(served.base, question) for question in questions]


@pytest.mark.slow
def test_model_vqa_science_steers_the_question_with_an_image_and_leaves_the_one_without_to_the_base(
    programs: Programs, ask: Asker, served: Served, questions: list[Question]
) -> None:
    with_image, without = _answers(programs["model_vqa_science"])
    assert with_image == ask(served.adapter, questions[0], max_new_tokens=LONGEST)
    assert with_image != ask(served.base, questions[0], max_new_tokens=LONGEST)
    assert without == ask(served.base, Question(questions[0].text, None), max_new_tokens=LONGEST)


@pytest.mark.slow
def test_model_vqa_mmbench_answers_with_an_adapter_over_a_plain_language_model(
    programs: Programs, ask: Asker, served: Served, questions: list[Question]
) -> None:
    asked = Question(f"{questions[1].text}\nA. red\nB. blue", questions[1].image)
    answers = _answers(programs["model_vqa_mmbench"])
    assert answers == [ask(served.over_plain_llm, asked, max_new_tokens=LONGEST)]
    # The tiny LLaVA is that language model with that projector: unsteered, it would answer this.
    assert answers != [ask(served.base, asked, max_new_tokens=LONGEST)]


def _output(program: Future[Ended]) -> str:
    ended = program.result()
    assert ended.returncode == 0, f"{ended.stdout[-1000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def _answers(program: Future[Ended]) -> list[str]:
    _output(program)
    words = program.result().args
    answers = Path(words[words.index("--answers-file") + 1]).read_text()
    return [json.loads(line)["text"] for line in answers.splitlines()]


def _write_science_questions(file: Path, questions: list[Question]) -> None:
    first = questions[0]
    file.write_text(
        json.dumps(
            [
                {
                    "id": "1",
                    "image": first.image,
                    "conversations": [{"from": "human", "value": f"<image>\n{first.text}"}],
                },
                {"id": "2", "conversations": [{"from": "human", "value": first.text}]},
            ]
        )
    )


def _write_mmbench_questions(file: Path, question: Question, images: Path) -> None:
    row = {
        "index": "1",
        "question": question.text,
        "hint": "nan",
        "A": "red",
        "B": "blue",
        "C": "nan",
        "D": "nan",
        "image": base64.b64encode((images / str(question.image)).read_bytes()).decode(),
    }
    file.write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
