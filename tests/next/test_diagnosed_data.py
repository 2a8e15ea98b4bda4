"""Samples of `inference/training_samples.py`, which diagnoses measure, are those of LLaVA-NeXT's own training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import next_llava
import pytest
import torch
from next_llava import NextLlava

from llava_steering_plugin.components.picture_layouts import grid_of
from llava_steering_plugin.inference.training_samples import TrainingSamples


@pytest.mark.parametrize("aspect", ["anyres_max_9", "anyres", "pad"])
def test_a_sample_has_the_loss_that_it_has_in_a_training(
    aspect: str, model: Any, made: NextLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava import conversation
    from llava.train.train import DataArguments, make_supervised_data_module
    from transformers import AutoTokenizer

    grid = list(map(list, grid_of(next_llava.GRID, 56)))
    cut = {"image_aspect_ratio": aspect, "image_grid_pinpoints": grid, "mm_use_im_start_end": False}
    for name, value in cut.items():
        monkeypatch.setattr(model.config, name, value, raising=False)
    file = tmp_path / "data.json"
    listed = json.loads(made.data.read_text())
    one_picture = [each for each in listed if isinstance(each.get("image", ""), str) and "video" not in each]
    file.write_text(json.dumps(one_picture))
    tokenizer, processor = AutoTokenizer.from_pretrained(made.qwen), model.get_vision_tower().image_processor
    samples = TrainingSamples(model, tokenizer, processor, file, made.tiny.images, "qwen_1_5")

    described = DataArguments(str(file), image_folder=str(made.tiny.images), is_multimodal=True)
    for name, value in {**cut, "image_processor": processor}.items():
        setattr(described, name, value)
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["qwen_1_5"])
    trained = make_supervised_data_module(tokenizer, described)
    numbers = range(len(samples.entries))  # its data set never says where it ends
    with torch.no_grad():
        batches = [trained["data_collator"]([trained["train_dataset"][number]]) for number in numbers]
        expected = [float(model(**batch, use_cache=False).loss) for batch in batches]
        found = [float(samples.loss(number)) for number in numbers]
    assert found == expected and len(set(expected)) == len(expected) > 4
    scores = [samples.scored(number)() for number in numbers]
    assert [score.loss for score in scores] == pytest.approx(expected, rel=1e-5)
