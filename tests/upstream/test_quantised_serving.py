"""`--load-4bit` of upstream's chat with an adapter that brings its projector; fp16 training over packed weights."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from asking import Question
from quantising import quantised_asker, quantising_on_cpu
from tiny_llava import TinyLlava
from training_runs import plain_llm_overrides, subprocess_environment, train_flags, train_in_process

from llava_steering_plugin.upstream.train.attaching import attach_mode

QUANTISING = str(Path(__file__).parents[1] / "support" / "quantising.py")
TOKENS = 8


@pytest.fixture(scope="module")
def adapter(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on four bits over a plain language model, so that it carries the trained projector."""
    output = tmp_path_factory.mktemp("quantised-serving") / "pets"
    mode = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all", "bits": 4, "learning_rate": 1e-2}
    with quantising_on_cpu():
        train_in_process(train_flags(tiny, output, {**plain_llm_overrides(tiny), **mode}))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4])
def test_the_chat_answers_over_a_packed_backbone_as_the_python_api_does(
    adapter: Path, tiny: TinyLlava, patched_llava: Path, questions: list[Question], bits: int
) -> None:
    image = tiny.images / str(questions[0].image)
    words = ["--device", "cpu", "--model-path", str(adapter), f"--load-{bits}bit", "--image-file", str(image)]
    done = subprocess.run(
        [sys.executable, QUANTISING, "llava.serve.cli", *words, "--temperature", "0", "--max-new-tokens", str(TOKENS)],
        env=subprocess_environment(patched_llava),
        input=f"{questions[0].text}\n\n",
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    (answer,) = re.findall("^USER: ASSISTANT: (.*)$", done.stdout, re.MULTILINE)
    ask = quantised_asker(tiny.images, bits)
    assert answer.strip() == ask(adapter, questions[0], conversation="llava_v1", max_new_tokens=TOKENS)


def test_a_trained_projector_in_half_precision_becomes_what_gradscaler_accepts(
    tiny: TinyLlava, patched_llava: Path
) -> None:
    """As `--bits 4 --fp16` leaves it; transformers starts no fp16 training on the processor, so without its loop."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["mm_projector"], bnb_4bit_compute_dtype=torch.float16
    )
    with quantising_on_cpu():
        model = LlavaLlamaForCausalLM.from_pretrained(tiny.llava, quantization_config=packed)
    model.get_vision_tower().load_model()
    projector = model.get_model().mm_projector.half()
    flags = {"tuning_mode": "mores", "mores_tokens": "all", "adapter_path": None, "freeze_mm_mlp_adapter": False}
    given = Namespace(
        **flags, fp16=True, bf16=False, bits=4, seed=0, process_index=1, quant_type="nf4", double_quant=True
    )

    attachment = attach_mode(model, given, None)

    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    ids = torch.randint(300, 600, (1, 12))
    ids[:, 2] = -200
    pixels = torch.rand(1, 3, 56, 56)
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=ids, images=pixels, labels=ids.clone(), attention_mask=torch.ones_like(ids)).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # refuses gradients in float16
    assert all(parameter.grad is not None for parameter in attachment.trained().values())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in projector.parameters())
