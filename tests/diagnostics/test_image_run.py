"""One image and question, the base beside an adapter: attention of words, updates, effects, and their picture.

Modules: diagnostics/image/one_model.py, diagnostics/image/run.py, diagnostics/image/preflight.py,
diagnostics/image/answer_score.py, diagnostics/pictures/overlays.py, cli/diagnose/image.py.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_folders import save_lora
from PIL import Image
from reports import reported
from steered import load_llava, strengthen
from tiny_llava import IMAGE_SIDE, PATCH, VISUAL_TOKENS, TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin import attach, remove, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.cli import app
from llava_steering_plugin.diagnostics.image.answer_score import AnswerScore, differentiable_tower
from llava_steering_plugin.diagnostics.pictures.overlays import draw_image, scales_of
from llava_steering_plugin.diagnostics.positions import forced_pass
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.asking.forced import force_answer
from llava_steering_plugin.inference.images import read_image
from llava_steering_plugin.measures.effect import integrated_gradients, occlusion
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.pool.pool import BASE, AdapterPool

Run = Callable[..., dict[str, Any]]
Map = list[list[Any]]
SIDE = IMAGE_SIDE // PATCH


def flat(rows: Map) -> list[Any]:
    return [value for row in rows for value in row]


@pytest.fixture(scope="module")
def models(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters and a LoRA."""
    folder = tmp_path_factory.mktemp("models")
    model = load_llava(tiny.llava)
    for mode in (MoReS(rank=2, tokens="uniform5", layers="1,3"), MixLoRA(factors=4, rank=2, alpha=1.0)):
        attachment = strengthen(attach(model, mode))
        described = describe(attachment)
        base = replace(described.base, name_or_path=str(tiny.llava))
        attachment.config = replace(described, conversation="v1", base=base)
        save_adapter(model, folder / mode.name)
        remove(model)
    save_lora(model, folder / "llava-lora", tiny.llava)
    return {name: folder / name for name in ("mores", "mixlora", "llava-lora")}


@pytest.fixture
def picture(tiny: TinyLlava) -> Path:
    """120 x 56 pixels, padded to a square."""
    return next(file for file in sorted(tiny.images.iterdir()) if read_image(file).size == (120, 56))


@pytest.fixture
def show(picture: Path, tmp_path: Path) -> Run:
    """Runs `llava-steering diagnose image`, raises what it raises, and returns image.json."""

    def run(model: object, *words: str) -> dict[str, Any]:
        asked = ["--question", "What color is the circle?"] if "--question" not in words else []
        asked += ["--image", str(picture)] if "--image" not in words else []
        command = ["diagnose", "image", str(model), *asked, "--max-new-tokens", "6", "--output", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*command, "--device", "cpu", *words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads((tmp_path / "out" / "image.json").read_text())
        return found

    return run


def test_an_adapter_is_shown_beside_its_base(show: Run, models: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    found = show(models["mores"])
    assert found["measure"] == "image"
    assert (found["image"]["file"], found["image"]["width"], found["image"]["height"]) == (picture.name, 120, 56)
    thumbnail = base64.b64decode(found["image"]["thumbnail"].partition("base64,")[2])
    assert Image.open(io.BytesIO(thumbnail)).size == (120, 56)
    base, mores = found["models"]
    assert [(model["name"], model["kind"], model["conversation"]) for model in (base, mores)] == [
        ("base", "base", "v1"),
        ("mores", "mores", "v1"),
    ]
    for model in (base, mores):
        assert model["grid"] == {"rows": SIDE, "columns": SIDE, "box": [0, -32, 120, 88]}
        assert [word["text"] for word in model["words"]] == model["answer"].split()
        for word in model["words"]:
            layers = torch.tensor(word["attention_by_layer"])
            assert layers.shape == (4, SIDE, SIDE)
            torch.testing.assert_close(layers.mean(0), torch.tensor(word["attention"]), rtol=2e-3, atol=1e-6)
            assert sum(map(sum, word["attention"])) == pytest.approx(word["on_image"], rel=1e-2)
        assert model["effect"]["passes"] == VISUAL_TOKENS + 1
        assert torch.tensor(model["effect"]["values"]).abs().max() > 0.1
    assert base["words"] != mores["words"]
    assert "this is a base" in base["update"]["left_out"]
    update = mores["update"]
    assert update["layers"] == [1, 3]
    steered = [place for place, value in enumerate(flat(update["values"])) if value is not None]
    assert steered == [0, 4, 8, 11, 15]
    layers = [[value for value in flat(layer) if value is not None] for layer in update["values_by_layer"]]
    mean = [value for value in flat(update["values"]) if value is not None]
    torch.testing.assert_close(torch.tensor(layers).mean(0), torch.tensor(mean), rtol=2e-3, atol=0)

    rows = list(csv.DictReader((tmp_path / "out" / "image.csv").open()))
    effect = [row for row in rows if row["model"] == "mores" and row["map"] == "effect"]
    assert [float(row["value"]) for row in effect] == flat(mores["effect"]["values"])
    assert {row["layer"] for row in rows if row["map"] == "update"} == {"", "1", "3"}
    page = reported(tmp_path / "report.html", tmp_path / "out")
    drawn = page.maps()
    assert [each["z"] for each in drawn if each["zmin"] == 0][: len(base["words"])] == [
        word["attention"] for word in base["words"]
    ]
    assert [each["z"] for each in drawn if each["zmin"] < 0] == [base["effect"]["values"], mores["effect"]["values"]]
    assert [each["z"] for each in drawn][-1] == update["values"]
    assert len({each["zmax"] for each in drawn if each["zmin"] < 0}) == 1
    assert (drawn[0]["y0"], drawn[0]["dy"], drawn[0]["dx"]) == (-32 + 15, 30, 30)
    assert all(layout["images"][0]["source"] == found["image"]["thumbnail"] for _, layout in page.figures)
    hostile = {**found, "image": {**found["image"], "thumbnail": "http://x/y.png"}}
    (tmp_path / "hostile.json").write_text(json.dumps(hostile))
    with pytest.raises(SteeringError, match="its thumbnail is no JPEG or PNG in the file itself"):
        reported(tmp_path / "report.html", tmp_path / "hostile.json")

    before = (tmp_path / "out" / "image.png").read_bytes()
    draw_image(found, tmp_path / "out" / "image")  # the JSON alone is enough
    assert (tmp_path / "out" / "image.png").read_bytes() == before
    with Image.open(tmp_path / "out" / "image.png") as drawn:
        assert drawn.width > 800
    assert "log-probability lost" in (tmp_path / "out" / "image.svg").read_text()


def test_other_modes_say_why_they_have_no_updates_and_a_given_answer_is_measured_for_both(
    show: Run, models: dict[str, Path]
) -> None:
    base, mixlora = show(models["mixlora"], "--answer", "It is red.", "--occlusion-window", "2")["models"]
    for model in (base, mixlora):
        assert [word["text"] for word in model["words"]] == ["It", "is", "red."]
        effect = model["effect"]
        assert (effect["window"], effect["passes"]) == (2, 5)
        assert effect["values"][0][:2] == effect["values"][1][:2]
        assert len(set(effect["values"][0])) == 2
    assert base["log_probability"] != mixlora["log_probability"]
    assert mixlora["update"] == {"left_out": "only MoReS moves hidden states of patches; this is an adapter of mixlora"}


def test_a_lora_is_shown_beside_its_base_and_a_base_alone(
    show: Run, models: dict[str, Path], tiny: TinyLlava, tmp_path: Path
) -> None:
    base, lora = show(models["llava-lora"], "--effect", "none")["models"]
    assert (base["kind"], lora["kind"], base["path"]) == ("base", "lora", str(tiny.llava))
    assert base["words"] != lora["words"]
    assert base["effect"] == lora["effect"] == {"left_out": "--effect none"}
    found = show(tiny.llava, "--effect", "gradients", "--answer", "one two three four five six seven")
    (alone,) = found["models"]
    assert alone["effect"]["kind"] == "gradients"
    assert torch.tensor(alone["effect"]["values"]).abs().max() > 0.01

    # A picture of a long answer to a long question, with a sink.
    alone["sinks"] = [[0, 3]]
    found["settings"]["question"] = "What $color is the " + "very " * 60 + "long circle?"
    png, svg = draw_image(found, tmp_path / "drawn")
    assert "first 5 of 7 words" in svg.read_text()
    assert "crossed: sinks" in svg.read_text()
    assert png.stat().st_size < 500_000


def test_of_an_image_in_tiles_the_first_is_shown_and_the_tokens_of_all_counted(
    show: Run, tiny: TinyLlava, tmp_path: Path
) -> None:
    anyres = shutil.copytree(tiny.llava, tmp_path / "llava-anyres")
    config = json.loads((anyres / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[112, 56]], "mm_patch_merge_type": "flat"}
    (anyres / "config.json").write_text(json.dumps(config))
    (model,) = show(anyres, "--answer", "red", "--occlusion-window", "2")["models"]
    assert model["tokens"] == {"image": 3 * VISUAL_TOKENS, "shown": VISUAL_TOKENS}
    assert model["grid"]["box"] == [0, 0, 120, 56]
    (word,) = model["words"]
    assert 0 < sum(flat(word["attention"])) < word["on_image"]
    assert len(set(flat(model["effect"]["values"]))) == 4


@pytest.fixture(scope="module")
def scored(tiny: TinyLlava, patched_llava: Path) -> tuple[Any, Any]:
    """A LLaVA in float32, and the score of "It is red." for it."""
    from transformers import LlamaTokenizer

    model = load_llava(tiny.llava)
    forced = force_answer(LlamaTokenizer.from_pretrained(tiny.llava), "v1", "<image>\nWhat color is it?", "It is red.")
    this_pass = forced_pass(model, forced, {"images": torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE)})
    AdapterPool(model)
    return forced, AnswerScore(model, this_pass, (56, 56), torch.float32, BASE)


def test_the_score_and_a_hidden_window_are_what_the_plain_model_gives(scored: tuple[Any, Any]) -> None:
    forced, score = scored
    pixels = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE)
    place = torch.arange(IMAGE_SIDE) // PATCH
    numbers = (place[:, None] * SIDE + place[None])[None, None]
    found = occlusion(score, pixels, numbers, 3)

    def by_hand(given: torch.Tensor) -> float:
        """Adds up the answer's log-probabilities, one after another."""
        with torch.inference_mode():
            logits = score.model(input_ids=torch.tensor([forced.ids]), images=given).logits[0].double()
        answer = forced.ids[forced.answer :]
        start = len(logits) - len(answer)
        chances = [logits[start + number - 1].softmax(-1)[token] for number, token in enumerate(answer)]
        return float(sum(chance.log() for chance in chances))

    whole = by_hand(pixels)
    assert score(pixels.repeat(2, 1, 1, 1)).tolist() == pytest.approx([whole] * 2, rel=1e-4)
    hidden = pixels.clone()
    hidden[..., 2 * PATCH : 3 * PATCH, PATCH : 2 * PATCH] = 0  # row 2, column 1
    assert found[2 * SIDE + 1].item() == pytest.approx(whole - by_hand(hidden), abs=1e-4)

    with differentiable_tower(score.model):
        gradients, gap = integrated_gradients(score, pixels, numbers)
    difference = whole - by_hand(torch.zeros_like(pixels))
    assert float(gradients.sum()) - gap == pytest.approx(difference, rel=1e-3, abs=1e-3)
    assert abs(gap) < 0.1 * float(gradients.abs().sum())
    assert "forward" not in vars(score.model.get_vision_tower())
    with torch.enable_grad(), pytest.raises(RuntimeError):
        integrated_gradients(score, pixels, numbers)  # LLaVA's tower lets no gradient through


def test_colour_scales_hold_all_maps_of_a_kind_but_sinks() -> None:
    none = {"left_out": "why"}
    grid = {"rows": 1, "columns": 3, "box": [0, 0, 3, 1]}

    def model(attention: list[float], sinks: list[list[int]], effect: Any) -> dict[str, Any]:
        words = [{"text": "a", "attention": [attention]}]
        return {"grid": grid, "words": words, "sinks": sinks, "effect": effect, "update": none}

    one = model([0.1, 0.9, 0.2], [[0, 1]], {"values": [[0.5, -2.0, 1.0]]})
    other = model([0.3, 0.1, 0.1], [], none)
    assert scales_of([model([0.5, 0.5, 0.5], [[0, 0], [0, 1], [0, 2]], none)])["attention"] == 1.0
    assert scales_of([one, other]) == {"attention": 0.3, "effect": 2.0, "update": 1.0}


def test_everything_that_is_wrong_is_said_before_a_model_is_loaded(
    show: Run, tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.diagnostics.image import preflight as image_preflight
    from llava_steering_plugin.diagnostics.image import run as image_runs

    monkeypatch.setattr(image_runs, "open_model", lambda *_: pytest.fail("a model was loaded"))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(SteeringError) as refused:
        show("/nowhere", "--image", str(text), "--image", "/no/image.png", "--question", " ", "--effect", "oclusion")
    for part in (
        "--image is given 2 times, and one image is measured at a time",
        f"{text} cannot be read as an image",
        "there is no file /no/image.png",
        "--question is empty",
        "--effect oclusion: did you mean 'occlusion'?",
        "there is no folder /nowhere",
    ):
        assert part in str(refused.value)

    with pytest.raises(ArgumentsError, match=r"is no LLaVA: its config.json has no mm_vision_tower"):
        show(tiny.llm)
    with pytest.raises(SteeringError, match=r"(?s)<image> in its text.*--occlusion-window 2 has no use"):
        show(tiny.llava, "--question", "<image> What?", "--effect", "gradients", "--occlusion-window", "2")
    found = image_preflight.find_spec
    monkeypatch.setattr(image_preflight, "find_spec", lambda name: None if name == "captum" else found(name))
    with pytest.raises(ArgumentsError, match=r"needs captum: pip install -e '\.\[diagnostics\]'"):
        show(tiny.llava)


def test_an_empty_answer_of_a_model_is_said_with_its_name(show: Run, tiny: TinyLlava) -> None:
    with pytest.raises(ArgumentsError, match="--answer is empty"):
        show(tiny.llava, "--answer", "")
