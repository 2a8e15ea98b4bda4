"""A question may be about several images: the model sees each where the text has its mark, in any batch.

Modules: inference/asking/questions.py, inference/asking/prompts.py, inference/asking/answering.py,
inference/asking/question_lengths.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asking import Asker
from evaluating_fixtures import SHORT, Evaluate
from own_parts import ANYRES
from PIL import Image
from pooled import BASE
from steered import load_llava
from tiny_llava import VISUAL_TOKENS, TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.asking.prompts import said
from llava_steering_plugin.inference.asking.question_lengths import check_lengths
from llava_steering_plugin.inference.asking.questions import Question, read_questions

pytest_plugins = ["evaluating_fixtures", "pooled_fixtures", "steered_fixtures"]

TEXT = "What color is the circle?"
# As in question files; what the model is to read; the images in their order.
ASKED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"image": ["00.png", "03.png"], "text": TEXT}, f"<image>\n<image>\n{TEXT}", ["00.png", "03.png"]),
    ({"image": "01.png", "text": TEXT}, f"<image>\n{TEXT}", ["01.png"]),
    (
        {"image": ["02.png", "00.png", "04.png"], "text": "In <image> and <image>, what? And <image>?"},
        "In <image> and <image>, what? And <image>?",
        ["02.png", "00.png", "04.png"],
    ),
    ({"text": "How many sides does a triangle have?"}, "How many sides does a triangle have?", []),
    ({"image": ["03.png", "00.png"], "text": TEXT}, f"<image>\n<image>\n{TEXT}", ["03.png", "00.png"]),
    ({"image": ["01.png"], "text": "What shape? <image>"}, "What shape? <image>", ["01.png"]),
]
Alone = Callable[[Path, str, list[str]], str]


@pytest.fixture(scope="module")
def alone(tiny: TinyLlava, patched_llava: Path) -> Alone:
    """What a model that upstream's own function has loaded generates, called by hand."""
    asker = Asker(tiny.images)

    def answer(path: Path, text: str, names: list[str]) -> str:
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.conversation import conv_templates
        from llava.mm_utils import process_images, tokenizer_image_token

        chat = conv_templates["llava_v1"].copy()
        chat.append_message(chat.roles[0], text)
        chat.append_message(chat.roles[1], None)
        tokenizer, model, processor = asker.load(str(path), None)
        ids = tokenizer_image_token(chat.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        assert int((ids == IMAGE_TOKEN_INDEX).sum()) == len(names)
        seen: dict[str, Any] = {}
        if names:
            pictures = [Image.open(tiny.images / name).convert("RGB") for name in names]
            pixels = process_images(pictures, processor, model.config)
            precision = next(model.get_model().mm_projector.parameters()).dtype
            seen["images"] = [each.to(precision) for each in pixels]
            if model.config.image_aspect_ratio != "anyres":
                seen["images"] = torch.stack(seen["images"])
            seen["image_sizes"] = [picture.size for picture in pictures]
        with torch.inference_mode():
            output = model.generate(ids, do_sample=False, max_new_tokens=SHORT, **seen)
        return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()

    return answer


@pytest.mark.parametrize("batch_size", ["6", "1"])
def test_each_answer_is_that_of_a_call_by_hand_whatever_else_is_in_its_batch(
    evaluate: Evaluate, tiny: TinyLlava, folders: dict[str, Path], alone: Alone, batch_size: str
) -> None:
    names = ("cats", "pets", "birds", BASE)
    asked = [line | {"question_id": number, "adapter": names[number % 4]} for number, (line, _, _) in enumerate(ASKED)]
    lines = evaluate(asked, "--batch-size", batch_size)
    expected = [
        alone(folders.get(names[number % 4], tiny.llava), text, images)
        for number, (_, text, images) in enumerate(ASKED)
    ]
    assert [line["text"] for line in lines] == expected
    assert [line["prompt"] for line in lines] == [line["text"] for line, _, _ in ASKED]
    assert len(set(expected)) > 4, "equal answers would show nothing"


@pytest.fixture(scope="module")
def tiled(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that cuts its images into tiles, as many as their shapes ask for."""
    model = load_llava(tiny.llava, **ANYRES)
    model.model.image_newline.data = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("tiled") / "llava-v1.6-tiny"
    model.half().save_pretrained(folder)
    for file in tiny.llava.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(params=["spatial_unpad", "spatial", "flat"])
def merged(tiled: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The base with each way in which LLaVA lays out the features of tiles."""
    config = tiled / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"mm_patch_merge_type": request.param}))
    yield tiled
    config.write_text(before)


def test_each_of_several_images_has_tiles_of_its_own(
    merged: Path, tiny: TinyLlava, alone: Alone, tmp_path: Path
) -> None:
    model = tmp_path / "llava-v1.6-tiny"  # of its own name for every layout: the models by hand are kept
    model.symlink_to(merged)
    file, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps(line | {"question_id": number}) + "\n" for number, (line, _, _) in enumerate(ASKED))
    )
    words = ["eval", model, "--question-file", file, "--image-folder", tiny.images, "--answers-file", answers]
    words += ["--device", "cpu", "--max-new-tokens", SHORT, "--conv-mode", "llava_v1"]
    expected = [alone(model, text, images) for _, text, images in ASKED]
    assert len(set(expected)) > 3
    # In half precision a row of a batch may round otherwise than alone, and a tie is decided by that: one of six may.
    for batch_size, fewest in ((1, len(ASKED)), (len(ASKED), len(ASKED) - 1)):
        answers.unlink(missing_ok=True)
        result = CliRunner().invoke(app, [*map(str, words), "--batch-size", str(batch_size)])
        assert result.exit_code == 0, result.output
        said = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
        assert sum(map(str.__eq__, said, expected)) >= fewest, (said, expected)


def test_every_mistake_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"image": []}, ": image must be the name of a file, or a list of at least one"),
        ({"image": ["a.png", 3]}, ": image must be"),
        ({"image": {"a": "b"}}, ": image must be"),
        ({"image": ["a.png", "b.png"], "text": "<image>?"}, " has 1 <image> in its text and names 2 images; write"),
        ({"image": "a.png", "text": "<image> <image>?"}, " has 2 <image> in its text and names 1 image;"),
        ({"text": "<image>?"}, " has 1 <image> in its text and names no images;"),
        ({"image": ["a.png"]}, ""),
        ({"image": [], "adapter": 3}, ": adapter must be a string"),
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question_id": 1, "text": "?"} | line) + "\n" for line, _ in bad))
    with pytest.raises(ArgumentsError) as refused:
        read_questions(file)
    for number, (_, message) in enumerate(bad, 1):
        assert (f"line {number}{message}" in str(refused.value)) == bool(message)
    assert "line 8: image must be" in str(refused.value)
    file.write_text(json.dumps({"question_id": 1, "text": "?", "image": ["a.png", "b.png"]}))
    assert read_questions(file) == [Question(1, "?", ("a.png", "b.png"), BASE)]


def test_every_image_that_is_not_there_is_named_before_a_model_is_looked_for(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    asked = {"question_id": 1, "text": "?", "image": ["lost.png", "00.png", "gone.png"]}
    with pytest.raises(SteeringError, match=r"(?s)no image gone\.png.*no image lost\.png.*nowhere is no model"):
        evaluate([asked], base=tmp_path / "nowhere")


def test_a_damaged_one_is_named_with_its_question(evaluate: Evaluate, tiny: TinyLlava, tmp_path: Path) -> None:
    images = Path(shutil.copytree(tiny.images, tmp_path / "images"))
    (images / "03.png").write_bytes(b"no image")
    with pytest.raises(SteeringError, match=r"question 'two' cannot be asked: .*03\.png cannot be read as an image"):
        evaluate([{"question_id": "two", "text": "?", "image": ["00.png", "03.png"]}], images=images)


def test_the_tokens_of_all_images_count_before_a_model_is_loaded(tiny: TinyLlava, patched_llava: Path) -> None:
    described = json.loads((tiny.llava / "config.json").read_text())

    def most(images: int, **config: Any) -> int:
        """The length of the longest context that is too short."""
        names = ("00.png", "04.png")[:images]
        question = Question(1, "<image>" * images + "?", names, BASE)
        settings = described | config | {"max_position_embeddings": 8}
        with pytest.raises(ArgumentsError, match="question 1: ") as refused:
            check_lengths([question], tiny.images, str(tiny.llava), settings, {}, 1)
        return int(str(refused.value).split("question 1: ")[1].split(" tokens")[0].replace(",", ""))

    assert most(2) - most(1) == VISUAL_TOKENS
    # The second is 120 x 56: two tiles side by side and the whole, and a newline after each row.
    assert most(2, **ANYRES) - most(1, **ANYRES) == 3 * VISUAL_TOKENS + 4


def test_every_mark_is_written_as_the_model_was_trained_with_it(patched_llava: Path) -> None:
    plain, wrapped = SimpleNamespace(), SimpleNamespace(mm_use_im_start_end=True)
    front, inside = Question(1, "?", ("a", "b"), BASE), Question(1, "<image> or <image>?", ("a", "b"), BASE)
    assert said(front, plain) == "<image>\n<image>\n?"
    assert said(front, wrapped) == "<im_start><image><im_end>\n" * 2 + "?"
    assert said(inside, plain) == "<image> or <image>?"
    assert said(inside, wrapped) == "<im_start><image><im_end> or <im_start><image><im_end>?"
