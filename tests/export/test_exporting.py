"""`llava-steering export`, from LLaVA's layout to transformers' and back.

Covers `export/exporting.py`, `export/comparing.py`, `export/plans.py`, `export/single_linear.py`, `export/configs.py`,
`export/tensor_names.py`, `export/vocabulary.py`, `export/verification.py` and `cli/export.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.export import verification
from llava_steering_plugin.export.exporting import Export, export
from llava_steering_plugin.export.verification import Answered, compare_answers, first_other_token

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def exported(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(str(tiny.llava), tmp_path_factory.mktemp("exported") / "tiny-hf")


@pytest.fixture
def changed(tiny: TinyLlava, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny LLaVA, with entries of its config and tensors changed; None takes a tensor out."""

    def copy(settings: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> Path:
        folder = Path(shutil.copytree(tiny.llava, tmp_path / "llava-v1.5-changed"))
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        whole = load_file(folder / "model.safetensors") | tensors
        kept = {name: value for name, value in whole.items() if value is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_the_command_says_what_it_compared(tiny: TinyLlava, tmp_path: Path) -> None:
    picture = next(tiny.images.glob("*.png"))
    command = ["export", str(tiny.llava), str(tmp_path / "hf"), "--image", str(picture)]
    done = CliRunner().invoke(app, [*command, "--conversation", "vicuna_v1"])
    assert done.exit_code == 0, done.output
    for text in ("82 tensors", "vicuna_v1", "one by one", picture.name, "they differ by at most", "crop"):
        assert text in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_transformers_own_class_loads_every_tensor(exported: Export) -> None:
    from transformers import LlavaForConditionalGeneration

    _, told = LlavaForConditionalGeneration.from_pretrained(exported.folder, output_loading_info=True)
    assert told["missing_keys"] == told["unexpected_keys"] == told["mismatched_keys"] == []


def test_logits_prompts_and_tensors_were_compared(exported: Export) -> None:
    said = "\n".join(exported.checks)
    assert "82 tensors" in said and "prompt of one turn" in said and "prompt of several turns" in said
    assert "in float32: they differ by at most" in said


def test_greedy_answers_are_equal_and_hold_no_token_that_was_added(exported: Export, tiny: TinyLlava) -> None:
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token
    from llava.model import LlavaLlamaForCausalLM
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)
    llava = LlavaLlamaForCausalLM.from_pretrained(tiny.llava, torch_dtype=torch.float32).eval()
    llava.get_vision_tower().load_model()
    other = LlavaForConditionalGeneration.from_pretrained(exported.folder, torch_dtype=torch.float32).eval()
    pixels = CLIPImageProcessor.from_pretrained(exported.folder)(
        [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")], return_tensors="pt"
    )["pixel_values"]
    prompt = "USER: <image>\nWhat color is it? ASSISTANT:"
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    theirs = AutoTokenizer.from_pretrained(exported.folder)(prompt, return_tensors="pt")
    for each in pixels:
        with torch.inference_mode():
            one = llava.generate(ids, images=each[None], do_sample=False, max_new_tokens=12)[0].tolist()
            two = other.generate(**theirs, pixel_values=each[None], do_sample=False, max_new_tokens=12)[0].tolist()
        answer = two[theirs.input_ids.shape[1] :]
        assert answer == [token for token in one if token != 1][: len(answer)] and len(answer) == 12
        assert max(answer) < other.config.image_token_index


def test_the_rows_that_no_model_has_learned_are_the_mean_of_all_others(exported: Export, tiny: TinyLlava) -> None:
    before = load_file(tiny.llava / "model.safetensors")
    after = load_file(exported.folder / "model.safetensors")
    config = json.loads((exported.folder / "config.json").read_text())
    for new, old in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        learned = before[old].shape[0]
        assert config["image_token_index"] == learned and after[new].shape[0] % 64 == 0
        assert torch.equal(after[new][:learned], before[old])
        mean = before[old].float().mean(0).half()
        assert torch.allclose(after[new][learned:].float(), mean.float().expand_as(after[new][learned:]), atol=1e-3)
        assert after[new][learned:].abs().sum(-1).min() > 0


def test_a_llava_that_was_exported_comes_back_to_the_bit(exported: Export, tiny: TinyLlava, tmp_path: Path) -> None:
    back = export(str(exported.folder), tmp_path / "llava-back")
    assert back.conversation == exported.conversation
    assert same_tensors(back.folder / "model.safetensors", tiny.llava / "model.safetensors")
    assert same_tensors(back.folder / "vision_tower" / "model.safetensors", tiny.tower / "model.safetensors")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (tiny.llava, back.folder))
    assert {key for key in old | new if old.get(key) != new.get(key)} == {"mm_vision_tower"}
    assert new["mm_vision_tower"] == str(back.folder / "vision_tower")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        first, second = (tiny.llava / file).read_bytes(), (back.folder / file).read_bytes()
        assert first == second or json.loads(first) == json.loads(second)


def test_a_model_of_transformers_without_our_record_becomes_a_llava(exported: Export, tmp_path: Path) -> None:
    from llava.model.builder import load_pretrained_model

    foreign = Path(shutil.copytree(exported.folder, tmp_path / "somebodys"))
    (foreign / "llava_export.json").unlink()
    tensors = load_file(foreign / "model.safetensors")
    newer = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.vision_model.", "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal"): value
        for name, value in tensors.items()
    }
    save_file(newer, foreign / "model.safetensors", {"format": "pt"})
    # transformers 4.37 does not load the newer names, so there is nothing to compare logits with.
    back = export(str(foreign), tmp_path / "llava-v1.5-made", logits=False, conversation="vicuna_v1")
    tokenizer, model, processor, _ = load_pretrained_model(
        str(back.folder), None, "llava-v1.5-made", device="cpu", device_map="cpu"
    )
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == 700
    assert processor.crop_size["height"] == 56 and model.get_vision_tower().is_loaded


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu"])
def test_one_linear_is_two_of_which_the_second_changes_nothing(
    changed: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    prefix = "model.mm_projector."
    gone = {f"{prefix}{layer}.{part}": None for layer in (0, 2) for part in ("weight", "bias")}
    name = prefix if kind == "linear" else f"{prefix}0."
    folder = changed(
        {"mm_projector_type": kind},
        gone | {f"{name}weight": torch.randn(64, 64).half(), f"{name}bias": torch.randn(64).half()},
    )
    done = export(str(folder), tmp_path / "hf")
    assert any("in float32: they differ" in check for check in done.checks)
    back = export(str(done.folder), tmp_path / "llava-back")
    assert same_tensors(back.folder / "model.safetensors", folder / "model.safetensors")


def test_start_and_end_marks_of_images_are_in_the_chat_template(changed: Callable[..., Path], tmp_path: Path) -> None:
    done = export(str(changed({"mm_use_im_start_end": True}, {})), tmp_path / "hf", logits=False)
    assert "<im_start><image><im_end>" in (done.folder / "chat_template.jinja").read_text()
    assert any("one turn" in check for check in done.checks)


@pytest.fixture
def unscaled(changed: Callable[..., Path], tiny: TinyLlava, tmp_path: Path) -> Path:
    """A LLaVA whose processor takes pictures of 56 x 56 pixels alone, and scales none."""
    tower = Path(shutil.copytree(tiny.tower, tmp_path / "tower"))
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    settings |= {"do_resize": False, "do_center_crop": False}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    return changed({"mm_vision_tower": str(tower)}, {})


def test_a_photograph_is_scaled_for_a_tower_that_takes_one_size_alone_in_both_layouts(
    unscaled: Path, tmp_path: Path
) -> None:
    done = export(str(unscaled), tmp_path / "hf")
    back = export(str(done.folder), tmp_path / "llava-back")
    for each in (done, back):
        assert any("in float32: they differ by at most" in check for check in each.checks)


def test_a_picture_of_another_size_than_the_tower_takes_is_refused_before_anything_is_written(
    unscaled: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "wide.png")
    said = r"takes pictures of 56 x 56 pixels, .* makes 80 x 80 of wide\.png\. Give a picture of the tower.s size"
    with pytest.raises(ArgumentsError, match=said):
        export(str(unscaled), tmp_path / "new" / "hf", image=tmp_path / "wide.png")
    assert not (tmp_path / "new").exists()
    Image.new("RGB", (56, 56)).save(tmp_path / "fits.png")
    assert any(
        "about fits.png" in check
        for check in export(str(unscaled), tmp_path / "hf", image=tmp_path / "fits.png").checks
    )


def test_a_processor_for_another_tower_is_refused_before_anything_is_written(
    changed: Callable[..., Path], tiny: TinyLlava, tmp_path: Path
) -> None:
    tower = Path(shutil.copytree(tiny.tower, tmp_path / "tower"))
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    settings |= {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ArgumentsError, match=r"takes pictures of 56 x 56 pixels, .* makes 28 x 28 of .* mend"):
        export(str(changed({"mm_vision_tower": str(tower)}, {})), tmp_path / "new" / "hf")
    assert not (tmp_path / "new").exists()


def test_logits_that_do_not_fit_into_memory_are_left_out_and_that_is_said(tiny: TinyLlava, tmp_path: Path) -> None:
    done = export(str(tiny.llava), tmp_path / "hf", memory=10_000)
    assert any("no logits were compared: a model in float32 takes" in note for note in done.notes)
    assert done.checks[0].startswith("82 tensors")


def test_other_logits_other_pixels_and_nan_are_refused() -> None:
    pixels, logits = torch.ones(1, 3, 2, 2), torch.arange(12.0).reshape(3, 4)
    assert compare_answers(Answered(pixels, logits), Answered(pixels, torch.cat([logits, logits], -1))) == 0
    for other, text in (
        (Answered(pixels * 2, logits), "other pixels"),
        (Answered(pixels, logits + 1e-3), "differ by"),
        (Answered(pixels, logits * torch.nan), "differ by nan"),
        (Answered(pixels, logits[:2]), "makes 2 tokens"),
    ):
        with pytest.raises(AdapterError, match=text):
            compare_answers(Answered(pixels, logits), other)


def test_nothing_is_left_of_an_export_that_is_found_to_differ(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verification.transformers_answer

    def wrong(*args: Any, **options: Any) -> list[Answered]:
        return [Answered(found.pixels, found.logits * 1.001) for found in original(*args, **options)]

    monkeypatch.setattr(verification, "transformers_answer", wrong)
    with pytest.raises(AdapterError, match="logits of both models differ by"):
        export(str(tiny.llava), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_first_token_that_differs_is_named(exported: Export, tiny: TinyLlava) -> None:
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)
    fast = AutoTokenizer.from_pretrained(exported.folder)
    prompt = "USER: <image>\nWhat color? ASSISTANT:"
    assert first_other_token(prompt, slow, prompt, fast, 700) is None
    said = first_other_token(prompt, slow, prompt.replace("\n", ""), fast, 700)
    assert said is not None and "<0x0A>" in said
