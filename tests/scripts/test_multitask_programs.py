"""What the multi-task measurement runs in a process of its own: recording MixLoRA's choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steered import strengthen
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, remove, save_adapter
from llava_steering_plugin.modes.mixlora import MixLoRA

pytest_plugins = ["steered_fixtures"]


def test_the_recorded_factors_are_those_of_each_question_asked_alone(
    model: Any, tiny: TinyLlava, tmp_path: Path
) -> None:
    from llava.mm_utils import get_model_name_from_path, process_images
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    from benchmarks.shared.choices import choices
    from experiments.multitask import routing

    adapter, recorded = tmp_path / "llava-v1-mixlora", tmp_path / "routing.npz"
    strengthen(attach(model, MixLoRA(factors=8, rank=2)))
    save_adapter(model, adapter)
    remove(model)
    names = sorted(path.name for path in tiny.images.glob("*.png"))[:3]
    asked = [("what is it?", names[0]), ("what is this, and where is it?", names[1]), ("what is it?", names[2])]
    lines = [{"question_id": n, "image": image, "text": text} for n, (text, image) in enumerate(asked)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    routing.main(adapter, questions, tiny.images, recorded)

    name = get_model_name_from_path(str(adapter))
    tokenizer, llava, processor, _ = load_pretrained_model(str(adapter), None, name, device="cpu")
    llava = llava.float().eval()
    from llava_steering_plugin.adapters.attachment import required

    found = np.load(recorded)
    assert all(found[router].shape == (3, 2) for router in found.files)
    differing = 0
    for place, line in enumerate(lines):
        ((_, ids),) = routing.batches([line], tokenizer)
        pixels = process_images([Image.open(tiny.images / line["image"]).convert("RGB")], processor, llava.config)
        with choices(required(llava).modules) as chosen, torch.inference_mode():
            llava.generate(ids, images=pixels.float(), do_sample=False, min_new_tokens=3, max_new_tokens=3)
        assert chosen.keys() == set(found.files)
        for router, mask in chosen.items():
            assert mask.nonzero()[:, 1].tolist() == found[router][place].tolist()
        differing += any((found[router][place] != found[router][0]).any() for router in found.files)
    assert differing, "questions are routed differently, so that the order of the rows shows"
