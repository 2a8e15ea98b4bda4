"""`llava-steering eval` on a GPU, where upstream leaves the vision tower in another precision than the projector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app

pytestmark = pytest.mark.gpu

SHORT = 8


def test_a_question_about_an_image_is_answered_as_by_upstreams_api(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    import torch
    from asking import Asker, Question
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    asked = json.loads(tiny.questions.read_text().splitlines()[0])
    (tmp_path / "q.jsonl").write_text(json.dumps(asked) + "\n")
    words = ["eval", tiny.llava, "--question-file", tmp_path / "q.jsonl", "--image-folder", tiny.images]
    words += ["--answers-file", tmp_path / "a.jsonl", "--device", "cuda", "--max-new-tokens", SHORT]
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [line] = (tmp_path / "a.jsonl").read_text().splitlines()

    name = get_model_name_from_path(str(tiny.llava))
    tokenizer, model, processor, _ = load_pretrained_model(str(tiny.llava), None, name, device="cuda")
    with Image.open(tiny.images / asked["image"]) as file:
        picture = file.convert("RGB")
    pixels = process_images([picture], processor, model.config).to("cuda", torch.float16)
    prompt = Asker.prompt(Question(asked["text"], asked["image"]), "llava_v1")
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None].to("cuda")
    with torch.inference_mode():
        output = model.generate(
            ids, images=pixels, image_sizes=[picture.size], do_sample=False, max_new_tokens=SHORT, use_cache=True
        )
    assert json.loads(line)["text"] == tokenizer.decode(output[0], skip_special_tokens=True).strip()
