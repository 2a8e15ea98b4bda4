"""Tokens are counted as LLaVA's trainer and model count them (`upstream/text/tokens.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_samples import PICTURE, pictured, said, turns
from tiny_llava import VISUAL_TOKENS, TinyLlava
from training_runs import upstream_globals_restored

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.upstream.text.tokens import USUAL_IMAGE_TOKENS, TokenCounter

SAMPLES = {
    "image": pictured(PICTURE, conversations=turns("It is red.", "A circle.")),
    "text": said(("human", "How many sides does a circle have?"), ("gpt", "It has zero sides.")),
    "text-of-turns": said(("human", "What?"), ("gpt", "A circle."), ("human", "Thank you."), ("gpt", "Welcome.")),
    "trailing-question": said(("human", "What?"), ("gpt", "A circle."), ("human", "And?")),
    "first-not-human": said(("gpt", "Hello."), ("human", "What?"), ("gpt", "A circle.")),
}


@pytest.fixture(scope="module")
def model(tiny: TinyLlava, patched_llava: Path) -> Iterator[Any]:
    with upstream_globals_restored():
        from llava.model import LlavaLlamaForCausalLM

        model = LlavaLlamaForCausalLM.from_pretrained(tiny.llava, torch_dtype=torch.float32)
        model.get_vision_tower().load_model()
        yield model


@pytest.mark.parametrize("longest", [16, 40, 50, 60, 70, 512])
@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_left_for_the_loss_is_what_llavas_model_gets(
    tiny: TinyLlava, model: Any, name: str, longest: int
) -> None:
    from llava import conversation
    from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset

    counter = TokenCounter(str(tiny.llava), "v1", longest)
    counted = counter.count(SAMPLES[name])
    data = tiny.root / "one.json"
    settings = SimpleNamespace(
        image_folder=str(tiny.images),
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_processor=model.get_vision_tower().image_processor,
    )
    conversation.default_conversation = conversation.conv_templates["v1"]
    dataset = LazySupervisedDataset(str(tiny.data), counter.tokenizer, settings)
    dataset.list_data_dict = [json.loads(json.dumps(SAMPLES[name]))]
    assert not data.exists()
    batch = DataCollatorForSupervisedDataset(counter.tokenizer)([dataset[0]])
    model.config.tokenizer_model_max_length = longest
    *_, embeddings, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    assert counted.learned == int((labels != -100).sum())
    assert min(counted.tokens, longest) == embeddings.shape[1]
    unlimited = TokenCounter(str(tiny.llava), "v1", 512).count(SAMPLES[name])
    assert unlimited.tokens == counted.tokens  # whatever is cut


def test_counting_leaves_llavas_template_and_the_sample_as_they_were_and_prints_nothing(
    tiny: TinyLlava, model: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from llava import conversation

    counter = TokenCounter(str(tiny.llava), "plain", 512)
    before, sample = conversation.default_conversation, pictured(PICTURE)
    copied = json.loads(json.dumps(sample))
    caption = counter.count(sample)
    assert conversation.default_conversation is before and sample == copied
    assert caption.tokens < TokenCounter(str(tiny.llava), "v1", 512).count(sample).tokens
    TokenCounter(str(tiny.llava), "v1", 512).count(SAMPLES["trailing-question"])  # LLaVA prints a warning of it
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("version", ["v0", "v0.5", "v1", "llava_llama_2", "llava_v0", "unknown"])
def test_every_version_that_llava_takes_is_counted(tiny: TinyLlava, model: Any, version: str) -> None:
    counted = TokenCounter(str(tiny.llava), version, 512).count(SAMPLES["image"])
    assert counted.tokens > VISUAL_TOKENS and counted.learned


def test_marks_around_an_image_are_counted(tiny: TinyLlava, model: Any, tmp_path: Path) -> None:
    other = tmp_path / "llava"
    other.mkdir()
    for file in tiny.llava.iterdir():
        if file.suffix in (".json", ".model") and file.name != "config.json":
            (other / file.name).symlink_to(file)
    config = json.loads((tiny.llava / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "mm_use_im_start_end": True}))
    usual = TokenCounter(str(tiny.llava), "v1", 512).count(SAMPLES["image"])
    assert TokenCounter(str(other), "v1", 512).count(SAMPLES["image"]).tokens == usual.tokens + 2
    (other / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tmp_path / "nothing")}))
    unknown = TokenCounter(str(other), "v1", 512)
    assert unknown.image_tokens == USUAL_IMAGE_TOKENS
    assert len(unknown.notes) == 1 and unknown.notes[0].startswith("576 tokens are assumed for an image: ")
    assert TokenCounter(str(other), "v1", 512, str(tiny.tower)).image_tokens == VISUAL_TOKENS


def test_a_base_that_is_none_is_named(tiny: TinyLlava, model: Any, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="nothing"):
        TokenCounter(str(tmp_path / "nothing"), "v1", 512)
    (tmp_path / "config.json").write_text((tiny.llava / "config.json").read_text())
    with pytest.raises(SteeringError, match=f"the tokenizer of {tmp_path} cannot be loaded"):
        TokenCounter(str(tmp_path), "v1", 512)
    (tmp_path / "llava_steering_config.json").write_text("{}")
    assert issubclass(ArgumentsError, SteeringError)


def test_a_version_that_llava_does_not_know_is_noted(tiny: TinyLlava, patched_llava: Path) -> None:
    assert any("--version v9 is no" in note for note in TokenCounter(str(tiny.llava), "v9", 512).notes)
    assert not any("--version" in note for note in TokenCounter(str(tiny.llava), "v0", 512).notes)
