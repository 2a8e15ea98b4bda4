"""A run over a question file measures the answers that the models give, keeps them, and goes on where it ended.

Modules: diagnostics/modality/one_model.py, diagnostics/positions.py, diagnostics/records.py, diagnostics/results.py,
diagnostics/modality/run.py, diagnostics/modality/summary.py, diagnostics/pictures/plots.py, inference/asking/forced.py,
cli/diagnose/modality.py, cli/diagnose/__init__.py, cli/diagnose/options.py, cli/diagnose/progress.py.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosing import diagnosed
from PIL import Image
from reports import reported
from safetensors import safe_open
from safetensors.torch import save_file
from steered import load_llava, strengthen
from tiny_llava import VISUAL_TOKENS, TinyLlava

from llava_steering_plugin import __version__, attach, remove, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.diagnostics.modality.one_model import choose_questions
from llava_steering_plugin.diagnostics.positions import forced_pass
from llava_steering_plugin.diagnostics.preflight import shared_template
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.asking.forced import force_answer
from llava_steering_plugin.inference.asking.questions import Question, read_questions
from llava_steering_plugin.measures.modality import Kind
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def adapters(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = load_llava(tiny.llava)
    folders = {}
    for mode in (MoReS(rank=2, tokens="all"), MixLoRA(factors=4, rank=2, alpha=1.0)):
        attachment = strengthen(attach(model, mode))
        described = describe(attachment)
        base = replace(described.base, name_or_path=str(tiny.llava))
        attachment.config = replace(described, conversation="v1", base=base)
        folders[mode.name] = tmp_path_factory.mktemp("adapters") / mode.name
        save_adapter(model, folders[mode.name])
        remove(model)
    return folders


@pytest.fixture
def diagnose(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> Run:
    """Runs `llava-steering diagnose modality` and returns modality.json."""

    def run(*words: str, questions: Path | None = None) -> dict[str, Any]:
        short = ("--max-new-tokens", "6", "--batch-size", "3")
        file = str(questions or tiny.questions)
        return diagnosed("modality", tiny, tmp_path / "out", *words, "--question-file", file, *short)

    return run


def test_bases_and_adapters_in_one_run(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    found = diagnose(f"base={tiny.llava}", *map(str, adapters.values()), "--samples", "4")
    models = {model["name"]: model for model in found["models"]}
    assert [(name, model["kind"], model["answers"]) for name, model in models.items()] == [
        ("base", "base", 4),
        ("mores", "mores", 4),
        ("mixlora", "mixlora", 4),
    ]
    assert found["settings"]["conv_mode"] == "v1", "the adapters' own, for the base too"
    assert len({model["tokens"]["system"] for model in models.values()}) == 1, "all read the same system prompt"
    for model in models.values():
        assert model["base"] == str(tiny.llava)
        assert model["tokens"]["image"] == VISUAL_TOKENS
        assert model["tokens"]["first"] == 1
        ratio = model["lmar"]["all text"]
        layers = zip(ratio["low"], ratio["mean"], ratio["high"], strict=True)
        assert all(low <= mean <= high for low, mean, high in layers)
        assert len(ratio["mean"]) == len(model["lmar_by_head"]) == 4
        total = [sum(values) for values in zip(*(each["mean"] for each in model["shares"].values()), strict=True)]
        assert total == pytest.approx([1] * 4, abs=1e-4)
    assert models["base"]["lmar"] != models["mores"]["lmar"] != models["mixlora"]["lmar"]

    rows = list(csv.DictReader((tmp_path / "out" / "modality.csv").open()))
    last = next(row for row in rows if row["model"] == "mores" and row["of"] == "all text" and row["layer"] == "3")
    assert float(last["mean"]) == models["mores"]["lmar"]["all text"]["mean"][3]
    with Image.open(tmp_path / "out" / "modality.png") as picture:
        assert picture.width > 800
    assert "mixlora" in (tmp_path / "out" / "modality.svg").read_text()

    lines = reported(tmp_path / "report.html", tmp_path / "out").traces("attention ratio")
    assert {name: line["y"] for name, line in lines.items()} == {
        name: model["lmar"]["all text"]["mean"] for name, model in models.items()
    }


def test_adapters_of_several_templates_have_none_in_common(
    tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    models = {"base": str(tiny.llava), "mores": str(adapters["mores"])}
    assert shared_template(models) == "v1"
    assert shared_template({"base": str(tiny.llava)}) is None
    other = tmp_path / "other"
    shutil.copytree(adapters["mores"], other)
    weights = other / "adapter_model.safetensors"
    with safe_open(weights, "pt") as file:
        header = {
            name: text.replace('"conversation": "v1"', '"conversation": "v0"') for name, text in file.metadata().items()
        }
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, weights, header)
    assert shared_template({"other": str(other)}) == "v0"
    assert shared_template({**models, "other": str(other)}) is None


def test_an_interrupted_run_goes_on_and_ends_as_the_whole_one(
    diagnose: Run, adapters: dict[str, Path], tmp_path: Path
) -> None:
    whole = diagnose(str(adapters["mores"]))
    assert whole["plugin_version"] == __version__
    assert datetime.fromisoformat(whole["date"]).tzinfo is not None
    kept = tmp_path / "out" / "modality" / "mores.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7  # the settings and six answers
    kept.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    assert diagnose(str(adapters["mores"])) == whole  # with the time at which it was measured first
    assert kept.read_bytes() == b"".join(lines)

    with pytest.raises(ArgumentsError, match=r"(?s)of other settings.*choose another --output.*seed: 0 there, 1 now"):
        diagnose(str(adapters["mores"]), "--seed", "1")
    kept.write_bytes(b"[]\n")
    with pytest.raises(ArgumentsError, match="holds no measurements"):
        diagnose(str(adapters["mores"]))


def test_given_answers_are_measured_in_their_place(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    asked = [json.loads(line) for line in tiny.questions.read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"
    given = [{"question_id": each["question_id"], "text": "red"} for each in asked]
    answers.write_text("".join(json.dumps(each) + "\n" for each in given))
    (model,) = diagnose(str(adapters["mores"]), "--answers-file", str(answers))["models"]
    assert model["answers"] == len(asked)
    kept = (tmp_path / "out" / "modality" / "mores.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["answer"] for line in kept} == {"red"}
    assert model["tokens"]["answer"] == pytest.approx(json.loads(kept[0])["counts"]["answer"])


def test_questions_without_an_image_are_counted_and_those_that_do_not_fit_named(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    asked = [json.loads(line) for line in tiny.questions.read_text().splitlines()][:2]
    text = {"question_id": "text", "text": "How many sides does a circle have?"}
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(each) + "\n" for each in [*asked, text]))
    (model,) = diagnose(str(adapters["mores"]), questions=questions)["models"]
    assert model["answers"] == 2
    assert model["left_out"] == {"about no image": 1}

    questions.write_text(json.dumps(text) + "\n")
    with pytest.raises(ArgumentsError, match="none of the questions names an image"):
        diagnose(str(adapters["mores"]), questions=questions)


def test_answers_that_are_missing_are_all_named_before_a_model_loads(
    diagnose: Run, tiny: TinyLlava, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": 0, "text": "red"}\n{"text": "blue"}\n')
    with pytest.raises(SteeringError, match=r"(?s)line 2 is no answer.*question 1 has no answer.*question 2"):
        diagnose("/nowhere", "--answers-file", str(answers))
    with pytest.raises(SteeringError, match="/nowhere"):
        diagnose("/nowhere")


def test_the_forced_pass_predicts_the_tokens_that_were_generated(tiny: TinyLlava, patched_llava: Path) -> None:
    from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
    from llava_steering_plugin.inference.models import open_model

    opened = open_model(str(tiny.llava), None, {"device": "cpu"})
    answering = BatchAnswers(opened.loaded, tiny.images, AnswerOptions(1, None, {"max_new_tokens": 6}))
    question = read_questions(tiny.questions)[1]
    generated = answering.generated([question])[0].tolist()[-6:]
    tokenizer = opened.loaded.tokenizer
    forced = force_answer(tokenizer, answering.template(question), answering.said(question), generated)
    this_pass = forced_pass(opened.loaded.pool.model, forced, answering.pixels([question]), opened.adapter)
    kinds = this_pass.kinds[0]
    assert int((kinds == Kind.FIRST).sum()) == 1
    assert int((kinds == Kind.IMAGE).sum()) == VISUAL_TOKENS
    assert int((kinds == Kind.ANSWER).sum()) == 6
    logits = this_pass.forward().logits[0]
    assert logits[-7:-1].argmax(-1).tolist() == generated


@pytest.mark.parametrize(
    ("template", "system", "answer"),
    [
        ("v1", "A chat between a curious user", "It is red."),
        ("llava_llama_2", "You are a helpful language and vision assistant", "It is red."),
        ("mistral_instruct", None, "It is red."),
        ("chatml_direct", "Answer the questions.", "It is red."),
    ],
)
def test_the_parts_of_a_conversation_are_found_in_every_template(
    tiny: TinyLlava, patched_llava: Path, template: str, system: str | None, answer: str
) -> None:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny.llava)
    forced = force_answer(tokenizer, template, "<image>\nWhat color is the circle?", answer)
    said = [token for token in forced.ids if token >= 0]
    assert forced.first
    assert tokenizer.decode(said[-(len(forced.ids) - forced.answer) :]).startswith(answer)
    of_system = tokenizer.decode(forced.ids[forced.system.start : forced.system.stop])
    assert (system in of_system) if system else not of_system
    assert "What color" not in of_system


def test_questions_are_chosen_by_the_seed_in_the_order_of_the_file() -> None:
    questions = [Question(number, "?", () if number % 5 == 4 else ("a.png",), "") for number in range(50)]
    chosen = choose_questions(questions, 10, seed=1)
    ids = [question.id for question in chosen.questions]
    assert ids == sorted(ids)
    assert len(ids) == 10
    assert chosen.text_only == 10
    assert chosen == choose_questions(questions, 10, seed=1) != choose_questions(questions, 10, seed=2)
    assert len(choose_questions(questions, 100, seed=0).questions) == 40
    with pytest.raises(ArgumentsError, match=r"same question_id.*: 7\. Give"):
        choose_questions([*questions, Question(7, "Again?", ("b.png",), "")], 10, seed=1)


def test_a_sequence_that_the_model_cuts_is_refused(tiny: TinyLlava, patched_llava: Path) -> None:
    model = load_llava(tiny.llava, tokenizer_model_max_length=20)
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny.llava)
    forced = force_answer(tokenizer, "v1", "<image>\nWhat color is the circle?", "red")
    with pytest.raises(ArgumentsError, match="the model reads 20"):
        forced_pass(model, forced, {"images": torch.randn(1, 3, 56, 56)})
