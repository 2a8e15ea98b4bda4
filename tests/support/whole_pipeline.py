"""Every program of upstream that the plugin could change, run one after the other: one side of the comparison.

Usage: python whole_pipeline.py TINY_ROOT FLAGS_OF_TRAINING... in the folder that gets the results. The path decides
which llava it is. Relative folders keep paths out of the configs. The seed is set once, before llava is imported: a
random number that the plugin drew anywhere shows in all that follows.
"""

from __future__ import annotations

import gc
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_llava import TinyLlava
from training_runs import LORA, stage_1_overrides, train_flags

LOADS = (  # model_path, model_base as the user gives them
    ("llava-stage1", "llm"),
    ("llava-full", None),
    ("llava-lora", "llava"),
)


def train_all(tiny: TinyLlava, extra_flags: list[str]) -> None:
    from llava.train.train import train

    gc.freeze()  # what was imported is no garbage: every training would look for it there

    checkpoints = {"save_strategy": "steps", "save_steps": 2}
    for output, overrides in (
        ("llava-stage1", stage_1_overrides(tiny) | checkpoints),
        ("llava-full", checkpoints),
        ("llava-lora", LORA | {"dataloader_num_workers": 1}),
    ):
        sys.argv = ["train.py", *train_flags(tiny, Path(output), overrides), *extra_flags]
        train()


def load_and_answer(tiny: TinyLlava) -> list[dict[str, Any]]:
    """What load_pretrained_model returns, and its answers: greedy, sampled, by beams; with an image and without."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    question = json.loads(tiny.questions.read_text().splitlines()[0])
    image = Image.open(tiny.images / question["image"])
    found = []
    for path, base in LOADS:
        name = get_model_name_from_path(path)
        tokenizer, model, processor, context = load_pretrained_model(
            path, base and str(getattr(tiny, base)), name, device="cpu"
        )
        pixels = process_images([image], processor, model.config).half()
        texts = []
        for prompt, images in (("USER: <image>\nWhat is it? ASSISTANT:", pixels), ("USER: Hello. ASSISTANT:", None)):
            ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
            for choice in ({}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 2}):
                sizes = [image.size] if images is not None else None
                output = model.generate(ids, images=images, image_sizes=sizes, max_new_tokens=12, **choice)
                texts += tokenizer.batch_decode(output, skip_special_tokens=True)
        tensors = {key: _digest(value) for key, value in model.state_dict().items()}
        classes = [type(thing).__qualname__ for thing in (tokenizer, model, processor)]
        config = json.loads(model.config.to_json_string())
        found.append(
            {"name": name, "classes": classes, "config": config, "context": context, "texts": texts, "tensors": tensors}
        )
    return found


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def evaluate(tiny: TinyLlava) -> None:
    """Upstream's eval script as `python -m` runs it, its CUDA calls redirected to the CPU."""
    to = torch.Tensor.to

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *args, **{**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs)

    torch.Tensor.to = to_cpu  # type: ignore[method-assign, assignment]
    sys.argv = ["model_vqa_loader.py", "--model-path", "llava-full", "--image-folder", str(tiny.images)]
    sys.argv += ["--question-file", str(tiny.questions), "--answers-file", "answers/full.jsonl"]
    sys.argv += ["--conv-mode", "vicuna_v1", "--temperature", "0", "--max_new_tokens", "12"]
    runpy.run_module("llava.eval.model_vqa_loader", run_name="__main__")


def main() -> None:
    torch.manual_seed(0)  # upstream draws the projector and LoRA before its Trainer seeds anything
    tiny, extra_flags = TinyLlava(Path(sys.argv[1])), sys.argv[2:]
    train_all(tiny, extra_flags)
    if not extra_flags:
        loaded = load_and_answer(tiny)
        Path("loaded.json").write_text(json.dumps(loaded, indent=1))
        evaluate(tiny)
    import llava

    plugin = sorted(name for name in sys.modules if name.startswith("llava_steering_plugin"))
    Path("side.json").write_text(json.dumps({"llava": llava.__file__, "plugin": plugin}))


if __name__ == "__main__":
    main()
