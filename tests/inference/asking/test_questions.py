"""The batched eval (`cli/evaluate.py`): the answers of each adapter alone, in upstream's formats, in any batch."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import Asker
from asking import Question as Asked
from evaluating_fixtures import SHORT, Evaluate
from forks import Forks
from pooled import BASE
from tiny_llava import TinyLlava, without_half_of_its_weights

from llava_steering_plugin import AdapterPool
from llava_steering_plugin.errors import ArgumentsError, NotFiniteError, SteeringError
from llava_steering_plugin.inference.asking.questions import Question, check_questions, read_questions

pytest_plugins = ["evaluating_fixtures", "fork_fixtures", "pooled_fixtures", "steered_fixtures"]


@pytest.fixture(scope="module")
def alone(tiny: TinyLlava, folders: dict[str, Path]) -> Callable[[dict[str, Any]], str]:
    """What upstream's Python API answers to one question, of one adapter, loaded as upstream loads it."""
    asker = Asker(tiny.images)

    def answer(question: dict[str, Any]) -> str:
        path = folders.get(question["adapter"], tiny.llava)
        asked = Asked(question["text"], question.get("image"))
        return asker(path, asked, conversation="llava_v1", max_new_tokens=SHORT)

    return answer


@pytest.mark.parametrize("batch_size", ["4", "1"])
def test_batches_over_several_adapters_answer_what_each_answers_alone(
    evaluate: Evaluate, questions: list[dict[str, Any]], alone: Callable[[dict[str, Any]], str], batch_size: str
) -> None:
    lines = evaluate(questions, "--batch-size", batch_size)
    assert [line["text"] for line in lines] == [alone(question) for question in questions]
    assert [line["question_id"] for line in lines] == [question["question_id"] for question in questions]
    assert [line["prompt"] for line in lines] == [question["text"] for question in questions]
    assert [line["model_id"] for line in lines] == [question["adapter"] for question in questions]
    assert len({line["answer_id"] for line in lines}) == len(lines)
    keys = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}  # those of upstream's answer files
    assert all(line.keys() == keys for line in lines)
    assert len({line["text"] for line in lines}) > 4, "equal answers would show nothing"


def test_questions_that_name_no_adapter_go_to_the_one_that_is_asked(
    evaluate: Evaluate, questions: list[dict[str, Any]], alone: Callable[[dict[str, Any]], str]
) -> None:
    nameless = [{key: value for key, value in each.items() if key != "adapter"} for each in questions[:3]]
    lines = evaluate(nameless, "--ask", "pets", "--max-resident", "1")
    assert [line["text"] for line in lines] == [alone(each | {"adapter": "pets"}) for each in nameless]
    assert {line["model_id"] for line in evaluate(nameless)} == {BASE}


def test_all_that_is_wrong_with_the_questions_is_said_at_once_and_before_anything_is_answered(
    evaluate: Evaluate, questions: list[dict[str, Any]]
) -> None:
    bad = [{"text": "?"}, {"question_id": 1, "text": "a", "adapter": 3}, {"question_id": 2, "text": "<image> what?"}]
    with pytest.raises(SteeringError, match=r"(?s)line 1 lacks.*line 2: adapter must be.*line 3 has 1 <image>"):
        evaluate(bad)
    lost = [questions[0] | {"image": "lost.png"}, questions[1] | {"adapter": "owls"}]
    with pytest.raises(SteeringError, match=r"(?s)no adapter 'owls'.*no image lost\.png"):
        evaluate(lost)
    with pytest.raises(SteeringError, match="unknown conversation template 'klingon'"):
        evaluate(questions[:1], "--conv-mode", "klingon")


def test_lines_end_where_llava_ends_them(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+0085 and other characters that end lines for str.splitlines."""
    texts = [f"Is this{end}one line?" for end in "\u2028\u2029\x85\x7f"]
    lines = [json.dumps({"question_id": number, "text": text}, ensure_ascii=False) for number, text in enumerate(texts)]
    file = tmp_path / "q.jsonl"
    for before, end in (("", "\n"), ("", "\r\n"), ("\ufeff", "\n\n"), ("", "\n  \n")):
        for after in ("", end):
            file.write_bytes((before + end.join(lines) + after).encode())
            assert [question.text for question in read_questions(file)] == texts
    assert [json.loads(line)["text"] for line in file.open(encoding="utf-8") if line.strip()] == texts, "as upstream"


def test_lines_that_no_tokenizer_and_no_parser_takes_are_named(tmp_path: Path) -> None:
    texts = ['"half of \\ud83d"', '"a", "more": ' + "[" * 20_000 + "]" * 20_000, '"a", "more": ' + "9" * 5_000]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(f'{{"question_id": 1, "text": {text}}}\n' for text in texts))
    with pytest.raises(ArgumentsError, match=r"(?s)line 1 has half a character.*line 2 is not.*deep.*line 3 is not"):
        read_questions(file)


def test_a_wrong_folder_of_images_is_one_line_and_many_lost_images_are_counted(tmp_path: Path) -> None:
    asked = [Question(number, "?", (f"{number}.png",), "__base__") for number in range(1000)]
    with pytest.raises(ArgumentsError) as refused:
        check_questions(asked, ["__base__"], tmp_path / "gone")
    assert str(refused.value).endswith(f"\n  - there is no folder {tmp_path}/gone, where their images should be")
    with pytest.raises(ArgumentsError, match=r"0\.png\n(?s:.*)\n  - and 980 more like these$"):
        check_questions(asked, ["__base__"], tmp_path)


def test_every_two_mistakes_are_named_in_one_message(
    evaluate: Evaluate, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    mistakes: dict[str, tuple[dict[str, Any], str]] = {
        "questions": ({"questions": [{"text": "?"}]}, "line 1 lacks question_id"),
        "image": ({"questions": [questions[0] | {"image": "lost.png"}]}, "there is no image lost.png"),
        "adapter": ({"words": ["--adapter", "x=/nope"]}, "/nope is no folder"),
        "name": ({"words": ["--adapter", "two words=/nope"]}, "'two words' cannot be the name"),
        "template": ({"words": ["--conv-mode", "klingon"]}, "unknown conversation template 'klingon'"),
        "device": ({"words": ["--device", "gpu"]}, "--device gpu"),
        "bits": ({"words": ["--load-4bit", "--load-8bit"]}, "exclude each other"),
        "answers": ({"words": ["--answers-file", str(tmp_path)]}, "cannot be written: Is a directory"),
    }
    for (first, said), (second, also) in itertools.combinations(mistakes.values(), 2):
        asked = (first | second).get("questions", questions[:1])
        with pytest.raises(SteeringError) as refused:
            evaluate(asked, *first.get("words", []), *second.get("words", []), base=tmp_path / "nowhere")
        for expected in (said, also)[first.keys() == second.keys() == {"questions"} :]:
            assert expected in str(refused.value)
        assert "nowhere is no model that can be loaded" in str(refused.value)


def test_adapters_are_called_as_by_every_other_command_and_looked_for_before_a_model_is(
    evaluate: Evaluate, questions: list[dict[str, Any]], folders: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(folders["cats"], tmp_path / "run" / "checkpoint-100")
    asked = [questions[0] | {"adapter": "run_checkpoint-100"}]
    [line] = evaluate(asked, "--adapter", str(checkpoint))
    assert line["text"] == evaluate([questions[0] | {"adapter": "cats"}])[0]["text"]
    with pytest.raises(SteeringError, match="'my cats' cannot be the name of an adapter"):
        evaluate(asked, "--adapter", f"my cats={checkpoint}")
    with pytest.raises(SteeringError, match=r"(?s)/no/such/dogs is no folder.* holds no adapter"):
        lost = ["--adapter", "/no/such/dogs", "--adapter", f"owls={tmp_path}"]
        evaluate(questions[:1], *lost, base=tmp_path / "nowhere")


def test_what_flags_and_files_can_tell_is_said_before_a_model_is_looked_for_and_old_answers_stay(
    evaluate: Evaluate, questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    nowhere, old = tmp_path / "nowhere", tmp_path / "made" / "answer.jsonl"
    old.parent.mkdir()
    old.write_text("old answers\n")
    (tmp_path / "a file").touch()
    for asked, words, said in (
        (questions[0] | {"adapter": "owls"}, [], r"'owls': give it with --adapter owls=PATH; known: __base__, cats"),
        (questions[0] | {"image": "x" * 300}, [], "there is no image xxx"),
        (questions[0], ["--conv-mode", "klingon"], "unknown conversation template"),
        (questions[0], ["--answers-file", tmp_path], "cannot be written: Is a directory"),
        (questions[0], ["--answers-file", tmp_path / "a file" / "b"], "cannot be written: .*Choose another"),
        (questions[0], ["--answers-file", tmp_path / ("x" * 300)], "cannot be written: File name too long"),
        (questions[0], ["--answers-file", tmp_path / "new"], "nowhere is no model that can be loaded"),
    ):
        with pytest.raises(SteeringError, match=said):
            evaluate([asked], *words, base=nowhere)
    assert old.read_text() == "old answers\n"
    assert not (tmp_path / "new").exists()


def test_a_question_whose_adapter_overflows_has_an_error_for_its_answer_and_the_others_of_its_batch_have_theirs(
    questions: list[dict[str, Any]], evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {line["question_id"]: line["text"] for line in evaluate(questions, "--batch-size", "4")}
    load = AdapterPool.load

    def spoil(pool: AdapterPool, name: str, source: Any) -> None:
        load(pool, name, source)
        if name == "pets":
            for module in pool._adapters[name].modules.values():
                for parameter in module.parameters():
                    parameter.data.fill_(float("nan"))

    monkeypatch.setattr(AdapterPool, "load", spoil)
    asked = [question for question in questions if question["adapter"] == "pets"]
    for way in (["--batch-size", "4"], ["--batch-size", "1", "--num-beams", "2"]):
        with pytest.raises(NotFiniteError, match=f"{len(asked)} of {len(questions)} questions have no answer"):
            evaluate(questions, *way)
        lines = [json.loads(line) for line in (tmp_path / "made" / "answer.jsonl").read_text().splitlines()]
        assert len(lines) == len(questions)
        for line in lines:
            if line["model_id"] == "pets":
                assert line["text"] == "" and "with the adapter 'pets'" in line["metadata"]["error"]
            else:
                assert line["metadata"] == {}
                assert "--num-beams" in way or line["text"] == expected[line["question_id"]]


def test_a_damaged_image_is_named_with_its_question_after_the_answers_before_it_are_written(
    evaluate: Evaluate, questions: list[dict[str, Any]], tiny: TinyLlava, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(tiny.images, tmp_path / "images"))
    damaged = images / questions[1]["image"]
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    number = questions[1]["question_id"]
    with pytest.raises(
        SteeringError,
        match=rf"question {number!r} cannot be asked: {damaged} cannot be read as an image, or is damaged",
    ):
        evaluate(questions[:2], "--batch-size", "1", images=images)
    [line] = (tmp_path / "made" / "answer.jsonl").read_text().splitlines()
    assert json.loads(line)["question_id"] == questions[0]["question_id"]


def test_a_base_that_cannot_be_loaded_is_a_message_and_no_traceback(
    evaluate: Evaluate, questions: list[dict[str, Any]], tiny: TinyLlava, tmp_path: Path
) -> None:
    broken = without_half_of_its_weights(tiny.llava, tmp_path / "broken")
    with pytest.raises(SteeringError, match="broken cannot be loaded"):
        evaluate(questions[:1], base=broken)
    with pytest.raises(SteeringError, match=r"nowhere is no model that can be loaded.*that the adapters were trained"):
        evaluate(questions[:1], base=tmp_path / "nowhere")
    (broken / "config.json").write_text('{"mm_vision_tower": "a tower"}')
    with pytest.raises(SteeringError, match="names no model_type"):
        evaluate(questions[:1], base=broken)


@pytest.mark.slow
def test_the_answers_are_those_of_upstreams_own_program(
    evaluate: Evaluate,
    questions: list[dict[str, Any]],
    tiny: TinyLlava,
    folders: dict[str, Path],
    patched_forks: Forks,
    tmp_path: Path,
) -> None:
    with_images = [question for question in questions if "image" in question]
    file, answers = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in with_images))
    done = patched_forks.run(
        *("-m", "llava_steering_plugin.launch", "--cpu", "llava.eval.model_vqa_loader"),
        *("--model-path", str(folders["pets"]), "--image-folder", str(tiny.images), "--question-file", str(file)),
        *("--answers-file", str(answers), "--conv-mode", "llava_v1", "--temperature", "0"),
        *("--max_new_tokens", str(SHORT)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    nameless = [{key: value for key, value in each.items() if key != "adapter"} for each in with_images]
    lines = evaluate(nameless, "--ask", "pets", "--batch-size", "3")
    expected = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert [line["text"] for line in lines] == expected
