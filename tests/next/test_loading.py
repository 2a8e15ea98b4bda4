"""LLaVA-NeXT's loader and its programs take our adapters; ours run on it.

Covers `upstream/model/towers.py`, `upstream/model/staging.py`, `upstream/model/loader_calls.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from next_llava import NextLlava
from PIL import Image
from steered import strengthen
from torch import Tensor

from llava_steering_plugin import AdapterPool, attach, disable_adapter, remove_adapter, save_adapter
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.inference.base_model import load_base
from llava_steering_plugin.inference.images import image_arguments
from llava_steering_plugin.modes.mores import MoReS

QUESTION = "<image>\nWhat color is the circle?"


def load(path: Path, base: Path | None = None) -> tuple[Any, Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    found = load_pretrained_model(str(path), base and str(base), get_model_name_from_path(str(path)), device="cpu")
    return found[0], found[1].float().eval(), found[2]


@pytest.fixture(scope="module", params=["llava", "llama", "qwen"])
def loaded(request: pytest.FixtureRequest, adapters: dict[str, Path]) -> tuple[str, Any, Any, Any]:
    return (request.param, *load(adapters[request.param]))


def asked(
    made: NextLlava, tokenizer: Any, model: Any, processor: Any, pictures: list[str], text: str
) -> dict[str, Any]:
    from llava.mm_utils import tokenizer_image_token

    images = [Image.open(made.tiny.images / name).convert("RGB") for name in pictures]
    given = image_arguments(images, processor, model)
    given["images"] = [each.float() for each in given["images"]]
    return {"ids": tokenizer_image_token(text, tokenizer, return_tensors="pt")[None], **given}


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, attention_mask=torch.ones_like(ids), **given).logits
    return found


def test_the_vision_tower_has_its_own_weights_and_the_adapter_is_on(
    loaded: tuple[str, Any, Any, Any], made: NextLlava, adapters: dict[str, Path]
) -> None:
    from transformers import CLIPVisionModel

    base, tokenizer, model, processor = loaded
    assert type(model).__name__ == {"qwen": "LlavaQwenForCausalLM"}.get(base, "LlavaLlamaForCausalLM")
    tower = model.get_vision_tower().vision_tower.state_dict()
    expected = CLIPVisionModel.from_pretrained(made.tiny.tower).state_dict()
    assert all(torch.equal(tower[name], value) for name, value in expected.items())
    assert model.config.name_or_path == str(getattr(made, base))
    given = asked(made, tokenizer, model, processor, ["00.png"], QUESTION)
    steered = logits(model, **given)
    with disable_adapter(model):
        frozen = logits(model, **given)
    assert torch.isfinite(steered).all() and (steered - frozen).abs().max() > 0.01 * frozen.abs().max()


def test_an_answer_is_the_same_greedy_text_with_and_without_a_cache(
    loaded: tuple[str, Any, Any, Any], made: NextLlava
) -> None:
    _, tokenizer, model, processor = loaded
    given = asked(made, tokenizer, model, processor, ["00.png"], QUESTION)
    ids = given.pop("ids")
    answers = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached, **given) for cached in (True, False)
    ]
    assert torch.equal(*answers) and answers[0].shape[1] > 1


def test_rows_of_several_adapters_answer_as_each_alone(
    made: NextLlava, adapters: dict[str, Path], patched_llava: Path
) -> None:
    base = load_base(str(made.llava), device="cpu", only_llava=True)
    model = base.pool.model.float().eval()
    pool: AdapterPool = base.pool
    pool.load("a", str(adapters["llava"]))
    alone = load(adapters["llava"])[1]
    given = asked(made, base.tokenizer, model, base.processor, ["00.png"], QUESTION)
    ids = given.pop("ids")
    several = {
        "images": given["images"] * 2,
        "image_sizes": given["image_sizes"] * 2,
        "modalities": given["modalities"] * 2,
    }
    rows = ids.repeat(2, 1)
    with torch.no_grad():
        mixed = model(rows, attention_mask=torch.ones_like(rows), adapter_names=["a", "__base__"], **several).logits
    expected = logits(alone, ids, **given)
    torch.testing.assert_close(mixed[:1], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with disable_adapter(alone):
        frozen = logits(alone, ids, **given)
    torch.testing.assert_close(mixed[1:], frozen, rtol=0, atol=1e-5 * float(frozen.abs().max()))


def test_rows_that_the_splice_drops_are_refused_with_what_to_pass(
    loaded: tuple[str, Any, Any, Any], made: NextLlava
) -> None:
    _, tokenizer, model, processor = loaded
    given = asked(made, tokenizer, model, processor, ["00.png"], QUESTION)
    rows = given["ids"].repeat(2, 1)
    with pytest.raises(TokenMapError, match=r"kept 1 of 2 rows.*modalities=\['image'\] \* 2"):
        logits(model, rows, images=given["images"] * 2, image_sizes=given["image_sizes"] * 2, modalities=["image"])


def test_its_programs_get_a_name_for_every_adapter(
    adapters: dict[str, Path], made: NextLlava, patched_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from llava.mm_utils import get_model_name_from_path

    assert get_model_name_from_path(str(adapters["llama"])) == "llava-v1-l.lama"
    assert get_model_name_from_path(str(adapters["qwen"])) == "llava-q.wen"
    assert "--conv-mode qwen_1_5" in caplog.text
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/llava_steering_config.json").write_text("{")
    assert get_model_name_from_path(str(tmp_path / "damaged")) == "damaged"


@pytest.fixture(scope="module")
def whole(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA as LLaVA-NeXT trains them: with the weights of a vision tower that was trained, too."""
    folder = tmp_path_factory.mktemp("whole") / "llava-qwen"
    tokenizer, model, _ = load(adapters["qwen"])
    remove_adapter(model)
    for parameter in model.get_vision_tower().parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tower_that_the_checkpoint_holds_is_the_one_that_sees(whole: Path, made: NextLlava) -> None:
    from transformers import CLIPVisionModel

    tower = load_base(str(whole), device="cpu", only_llava=True).pool.model.get_vision_tower().vision_tower.state_dict()
    expected = CLIPVisionModel.from_pretrained(made.tiny.tower).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(tower[name].float(), 1.5 * value, rtol=1e-2, atol=1e-3)


def test_a_base_of_the_type_that_such_a_model_has_in_llava_is_loaded_as_its_own_and_takes_its_adapters(
    whole: Path, made: NextLlava, tmp_path: Path
) -> None:
    """What LLaVA-NeXT calls llava_qwen is llava_qwen2 in LLaVA, by a component; its folder need not say Qwen."""
    named, other = (Path(shutil.copytree(whole, tmp_path / name)) for name in ("llava-qwen", "tuned"))
    described = json.loads((whole / "config.json").read_text())
    assert described["model_type"] == "llava_qwen"
    described |= {"model_type": "llava_qwen2", "architectures": ["LlavaQwen2ForCausalLM"]}
    (other / "config.json").write_text(json.dumps(described))
    (_, first, processor), (tokenizer, second, _) = load(named), load(other)
    assert type(second) is type(first) and type(second).__name__ == "LlavaQwenForCausalLM"
    weights, again = first.state_dict(), second.state_dict()
    assert weights.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in weights.items())
    given = asked(made, tokenizer, second, processor, ["00.png"], QUESTION)
    plain = logits(second, **given)
    assert torch.equal(plain, logits(first, **given))

    strengthen(attach(second, MoReS(rank=2, tokens="all")))
    steered = logits(second, **given)
    assert (steered - plain).abs().max() > 0.01 * plain.abs().max()
    save_adapter(second, tmp_path / "adapter")
    for base in (None, named):  # its own, and the same one by LLaVA-NeXT's name
        model = load(tmp_path / "adapter", base)[1]
        torch.testing.assert_close(logits(model, **given), steered, rtol=0, atol=1e-5 * float(steered.abs().max()))
    pool: AdapterPool = load_base(str(other), device="cpu", only_llava=True).pool
    pool.load("a", str(tmp_path / "adapter"))


def test_llava_steering_eval_answers_on_it(
    whole: Path, adapters: dict[str, Path], made: NextLlava, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from llava_steering_plugin.cli import app

    answers = tmp_path / "answers.jsonl"
    words = ["eval", str(whole), "--adapter", f"pets={adapters['qwen']}", "--question-file", str(made.tiny.questions)]
    words += ["--image-folder", str(made.tiny.images), "--answers-file", str(answers), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "4", "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    assert len([json.loads(line) for line in answers.read_text().splitlines()]) == 6
