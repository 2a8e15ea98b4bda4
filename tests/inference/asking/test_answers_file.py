"""A run of eval that is killed keeps its answers, and the same command ends with the file of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from evaluating_fixtures import ADAPTERS, SHORT, Evaluate
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.asking.answering import Answer, BatchAnswers
from llava_steering_plugin.inference.asking.answers_file import SUFFIX, AnswersFile, contents_of
from llava_steering_plugin.inference.asking.questions import Question

pytest_plugins = ["evaluating_fixtures", "pooled_fixtures", "steered_fixtures"]

SETTINGS = {"batch size": 2, "seed": 0}
ASKED = [Question(number, f"What is {number}?", (), "__base__") for number in range(5)]
SAMPLED = ("--temperature", "1.5", "--seed", "3")


def batches(first: int = 0, end: int = len(ASKED)) -> Iterable[tuple[int, list[Question], list[Answer]]]:
    """What a model would answer, in batches of two; it is killed before question `end`."""
    for start in range(first, len(ASKED), 2):
        if start >= end:
            raise KeyboardInterrupt
        batch = ASKED[start : start + 2]
        yield start, batch, [Answer(f"It is {question.id}.") for question in batch]


# The whole program, which `kill -9` ends where it is about to generate the fourth answer.
KILLED_AT_THE_FOURTH = """
import os, signal
from llava_steering_plugin.cli import main
from llava_steering_plugin.inference.asking.answering import BatchAnswers

generated, asked = BatchAnswers.generated, []

def killed(answering, batch):
    asked.append(batch)
    if len(asked) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return generated(answering, batch)

BatchAnswers.generated = killed
main()
"""


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    AnswersFile(tmp_path / "whole.jsonl", SETTINGS).write(batches(), 0)
    assert not (tmp_path / f"whole.jsonl{SUFFIX}").exists()
    return (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The answers of a run that was killed after four of five questions."""
    file = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        AnswersFile(file, SETTINGS).write(batches(end=4), 0)
    assert file.read_bytes().count(b"\n") == 4 and (tmp_path / f"a.jsonl{SUFFIX}").exists()
    return file


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda text: text, 4),
        (lambda text: text + b'{"question_id": 4, "pro', 4),
        (lambda text: text[:-5], 2),  # the third answer is whole, and its batch is not
        (lambda text: text.replace(b"It is 1.", b"It is 7."), 0),
        (lambda text: text[: text.rfind(b"{")] + b"\0\0\0\n", 2),
        (lambda text: b"", 0),
    ],
)
def test_what_is_whole_is_kept_and_the_rest_is_answered_again(
    killed: Path, whole: bytes, damage: Any, kept: int
) -> None:
    killed.write_bytes(damage(killed.read_bytes()))
    file = AnswersFile(killed, SETTINGS)
    assert file.answered(ASKED, 2) == kept
    file.write(batches(kept), kept)
    assert killed.read_bytes() == whole
    assert not killed.with_name(f"a.jsonl{SUFFIX}").exists()
    assert AnswersFile(killed, {"seed": 5}).answered(ASKED, 2) == 0, "a complete file is overwritten"


def test_a_run_with_other_settings_or_questions_is_refused_with_what_to_do(killed: Path, whole: bytes) -> None:
    before = killed.read_bytes()
    said = r"(?s)Repeat its settings .* delete .*a\.jsonl\.unfinished to begin anew.*batch size was 2, and is 4 now"
    with pytest.raises(ArgumentsError, match=said):
        AnswersFile(killed, SETTINGS | {"batch size": 4}).answered(ASKED, 4)
    with pytest.raises(ArgumentsError, match=r"line 1 of .* answers question 0, and line 1 of the questions is 3 now"):
        AnswersFile(killed, SETTINGS).answered(ASKED[3:], 2)
    assert killed.read_bytes() == before
    assert AnswersFile(killed, SETTINGS).answered([*ASKED, *ASKED], 2) == 4, (
        "questions that are still to come may change"
    )
    killed.with_name(f"a.jsonl{SUFFIX}").unlink()
    anew = AnswersFile(killed, {"batch size": 2})
    assert anew.answered(ASKED, 2) == 0
    anew.write(batches(), 0)
    assert [json.loads(line)["text"] for line in killed.read_bytes().split(b"\n")[:-1]] == [
        json.loads(line)["text"] for line in whole.split(b"\n")[:-1]
    ]


def test_a_full_disk_is_said_and_a_pipe_is_only_written_to(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match=r"/dev/full cannot be written any further: No space left"):
        AnswersFile(Path("/dev/full"), SETTINGS).write(batches(), 0)
    file = AnswersFile(Path("/dev/null"), SETTINGS)
    file.write(batches(), file.answered(ASKED, 2))
    assert not Path(f"/dev/null{SUFFIX}").exists()


def test_the_files_of_base_and_adapters_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "config.json").write_text("{}")
    hashed = contents_of(tmp_path, hashed=True)
    assert contents_of(tmp_path, hashed=True) == hashed and contents_of("owner/name", hashed=True) == "owner/name"
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert contents_of(tmp_path, hashed=True) != hashed


def test_files_that_nothing_reads_because_of_their_size_are_not_read_here_either(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = contents_of(tmp_path, hashed=True)
    for name in ("config.json", "more.safetensors"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)  # takes no block of the disk, and an hour to read
        assert before != (before := contents_of(tmp_path, hashed=True))


@pytest.mark.parametrize("flags", [(), SAMPLED], ids=["greedy", "sampled"])
def test_a_crash_in_the_middle_continues_to_the_same_file(
    evaluate: Evaluate,
    questions: list[dict[str, Any]],
    flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = tmp_path / "made" / "answer.jsonl"
    asked = questions[:5]
    evaluate(asked, "--batch-size", "2", *flags)
    expected = answers.read_bytes()
    asking, calls = BatchAnswers.generated, []

    def failing(self: BatchAnswers, batch: Any) -> Any:
        calls.append(len(batch))
        if len(calls) == 2:
            raise SteeringError("the power is off")
        return asking(self, batch)

    monkeypatch.setattr(BatchAnswers, "generated", failing)
    with pytest.raises(SteeringError, match="the power is off"):
        evaluate(asked, "--batch-size", "2", *flags)
    assert answers.read_bytes() == b"".join(expected.splitlines(True)[:2])
    with pytest.raises(SteeringError, match="batch size was 2, and is 3 now"):
        evaluate(asked, "--batch-size", "3", *flags)
    evaluate(asked, "--batch-size", "2", *flags)
    assert calls == [2, 2, 2, 1], "the first batch is not asked again"
    assert answers.read_bytes() == expected


@pytest.mark.slow
def test_a_program_that_is_killed_continues_to_the_same_file(
    tiny: TinyLlava,
    folders: dict[str, Path],
    questions: list[dict[str, Any]],
    evaluate: Evaluate,
    patched_llava: Path,
    tmp_path: Path,
) -> None:
    flags = ("--batch-size", "1", *SAMPLED)
    evaluate(questions, *flags)
    answers = tmp_path / "made" / "answer.jsonl"
    expected = answers.read_bytes()
    answers.unlink()
    words = ["eval", tiny.llava, "--question-file", tmp_path / "question.jsonl", "--image-folder", tiny.images]
    words += ["--answers-file", answers, "--device", "cpu", "--max-new-tokens", SHORT, *flags]
    words += [word for name in ADAPTERS for word in ("--adapter", f"{name}={folders[name]}")]
    command = [sys.executable, "-c", KILLED_AT_THE_FOURTH, *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_environment(patched_llava), timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert answers.read_bytes().count(b"\n") == 3
    assert Path(f"{answers}{SUFFIX}").exists()
    evaluate(questions, *flags)
    assert answers.read_bytes() == expected
