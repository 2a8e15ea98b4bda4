"""vLLM computes on an exported base what transformers does, and its template writes the first token."""

from __future__ import annotations

import pytest
import torch
from vllm_fixtures import NEW, Engine, Prompt, Shared

from llava_steering_plugin import load_adapter, remove_adapter
from llava_steering_plugin.components.vllm_template import FILE, with_bos

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")


@torch.inference_mode()
def of_transformers(shared: Shared, prompt: Prompt, answer: list[int], name: str | None) -> torch.Tensor:
    """The log probabilities of all tokens at every step of an answer: float32 [tokens, vocabulary]."""
    model, inputs = shared.reference.model, shared.reference.inputs(prompt)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], 1)
    if name is not None:
        load_adapter(model, shared.adapters[name])
    try:
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
    finally:
        if name is not None:
            remove_adapter(model)
    found: torch.Tensor = logits[0, -len(answer) :].log_softmax(-1)
    return found


@pytest.mark.parametrize("name", [None, "all-4", "f4l5-2"])
def test_tokens_are_as_likely_as_in_transformers(name: str | None, engine: Engine, shared: Shared) -> None:
    from vllm import SamplingParams

    # Not those of prompts: for them, where the head has slots for LoRAs, vLLM 0.32 for the CPU computes wrong shapes.
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=20)
    asked = [prompt.for_vllm for prompt in shared.prompts]
    done = engine.llm.generate(asked, sampling, lora_request=[shared.request(name)] * len(asked), use_tqdm=False)
    largest = 0.0
    for prompt, each in zip(shared.prompts, done, strict=True):
        (answer,) = each.outputs
        expected = of_transformers(shared, prompt, list(answer.token_ids), name)
        for here, step in zip(expected, answer.logprobs, strict=True):
            assert len(step) >= 20
            largest = max(largest, *(abs(found.logprob - float(here[token])) for token, found in step.items()))
    assert 0 < largest < 1e-4


def test_the_template_for_vllm_is_the_other_one_behind_the_first_token(shared: Shared) -> None:
    template = (shared.base / "chat_template.jinja").read_text()
    made = (shared.base / FILE).read_text()
    assert made == with_bos(template) == with_bos(made) != template
    messages = [{"role": "user", "content": "Hello?"}]
    tokenizer = shared.reference.processor.tokenizer
    plain, written = (
        tokenizer.apply_chat_template(messages, chat_template=each, tokenize=False, add_generation_prompt=True)
        for each in (template, made)
    )
    assert written == f"<s>{plain}"
    assert tokenizer(written, add_special_tokens=False).input_ids == tokenizer(plain).input_ids
