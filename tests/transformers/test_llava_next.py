"""An adapter that is trained on transformers' LlavaNext answers the same in another process, projector and all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from chat_bases import BASES, Collator, samples
from safetensors.torch import load_file, save_file
from steering_trainer import trainer_of

from llava_steering_plugin import get_model
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

pytest.importorskip("easy_vqa", reason="easy-vqa is missing: scripts/setup.sh --transformers installs it")
TOLERANCE = 1e-6  # of the largest logit: products of floats may depend on where a process has its memory
PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
from llava_steering_plugin import from_pretrained

adapter, batch, out = sys.argv[1:]
model, batch = from_pretrained(adapter), load_file(batch)
with torch.no_grad():
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous()}, out)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    BASES["LlavaNext"](folder)
    return folder


@pytest.mark.parametrize("with_projector", [False, True], ids=["adapter", "adapter and projector"])
@pytest.mark.parametrize("mode", [MoReS(rank=2), MixLoRA(factors=8, rank=2)], ids=lambda mode: mode.name)
def test_another_process_answers_as_the_one_that_trained(
    base: Path, tmp_path: Path, mode: Mode, with_projector: bool
) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    get_model(model, mode, train_projector=with_projector)
    trainer = trainer_of(base, tmp_path / "run", mode, model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    changed = {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}
    assert bool(changed) is with_projector

    batch = Collator(trainer.processing_class)(samples(2))
    del batch["labels"]
    assert batch["pixel_values"].shape[1] > 1  # tiles
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        tokens = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
        plain = transformers.AutoModelForImageTextToText.from_pretrained(base)(**batch).logits
    assert (logits - plain).abs().max() > 0.01 * logits.abs().max()

    save_file({name: value.contiguous() for name, value in batch.items()}, tmp_path / "batch.safetensors")
    files = [tmp_path / "adapter", tmp_path / "batch.safetensors", tmp_path / "out.safetensors"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    there = load_file(files[2])
    assert (there["logits"] - logits).abs().max() <= TOLERANCE * logits.abs().max()
    assert torch.equal(there["tokens"], tokens)
