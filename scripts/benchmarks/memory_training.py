"""Train in a process of its own, and write the peak of its memory: `python -m benchmarks.memory_training FILE FLAGS`.

Without a GPU the peak is the resident set (VmHWM) of the process during training, minus the resident set just before
the model is built. Libraries are warmed up before, so that their code does not count.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch

from .shared.process_memory import forget_peak, in_use, peak

CUDA = torch.cuda.is_available()


def train_and_measure(flags: list[str], result: Path) -> None:
    """Run upstream's train() with `flags`, and write the peak in bytes to `result`."""
    from llava_steering_plugin.upstream.install import install

    install()
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.train import train as upstream
    from transformers import TrainerCallback

    before: list[int] = []
    build = LlavaLlamaForCausalLM.from_pretrained

    def built(*args: Any, **kwargs: Any) -> Any:
        before.append(in_use(cuda=CUDA))
        return build(*args, **kwargs)

    class Peak(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gc.collect()
            forget_peak(cuda=CUDA)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            result.write_text(str(peak(cuda=CUDA) - before[0]), encoding="utf-8")

    class Watched(upstream.LLaVATrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.add_callback(Peak())

    upstream.__dict__["LLaVATrainer"] = Watched
    LlavaLlamaForCausalLM.from_pretrained = built
    _warm_up()
    sys.argv = ["train.py", *flags]
    upstream.train()


def _warm_up() -> None:
    """Load the code that a step runs: it is read from disk when first used, and is no part of the training's memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM(config).to("cuda" if CUDA else "cpu", dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.ones(1, 64, dtype=torch.long, device=model.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    gc.collect()


if __name__ == "__main__":
    train_and_measure(sys.argv[2:], Path(sys.argv[1]))
