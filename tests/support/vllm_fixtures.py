"""What the tests of vLLM share: prompts, adapters, what transformers answers with them, and vLLM's engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import save_file
from steered import strengthen
from tiny_llava import SYSTEM
from torch import Tensor

from llava_steering_plugin import attach, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.modes.mores import MoReS

NEW = 12  # tokens of every answer
# By name: the settings, and how far the parameters are from the identity.
ADAPTERS: dict[str, tuple[MoReS, float]] = {
    "all-1": (MoReS(rank=1, tokens="all"), 0.6),
    "all-4": (MoReS(rank=4, tokens="all"), 0.3),
    "f4l5-2": (MoReS(rank=2, tokens="f4+l5"), 0.5),
    "uniform9-3": (MoReS(rank=3, tokens="uniform9"), 0.5),
    "percent-1": (MoReS(rank=1, tokens="1%"), 3.0),
    "early-2": (MoReS(rank=2, tokens="all", layers="0-1"), 0.6),
    "every-2": (MoReS(rank=2, tokens="l8", layers="every:2"), 0.8),
    "chosen-2": (MoReS(rank=2, tokens="25%,f4+l5,all"), 0.5),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt with its pictures, as vLLM and transformers take it."""

    text: str
    images: tuple[Image.Image, ...]

    @property
    def for_vllm(self) -> dict[str, Any]:
        return {"prompt": self.text} | ({"multi_modal_data": {"image": list(self.images)}} if self.images else {})


def prompts_of(folder: Path) -> list[Prompt]:
    """Prompts with one and two pictures of several sizes."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    one = [
        Prompt(f"{SYSTEM} USER: <image>\n{question} ASSISTANT:", (pictures[number],))
        for number, question in enumerate(
            ("What color is the circle?", "What shape is red?", "Is it a triangle?", "How many sides are there?")
        )
    ]
    two = [
        Prompt(f"USER: <image>\nWhat is this? And this: <image>\n{question} ASSISTANT:", (pictures[a], pictures[b]))
        for a, b, question in ((5, 6, "Which is green?"), (7, 0, "What color is the first?"))
    ]
    return one + two


class Reference:
    """The base in transformers' own class, with and without adapters that our own hooks put on it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def save(self, mode: MoReS, size: float, seed: int, folder: Path) -> Path:
        """Save an adapter whose effect is plain to see."""
        strengthen(attach(self.model, mode), seed, size)
        try:
            save_adapter(self.model, folder)
        finally:
            remove_adapter(self.model)
        return folder

    def answers(self, prompts: list[Prompt], adapter: Path | None = None) -> list[list[int]]:
        """The tokens that it answers, of each prompt alone."""
        if adapter is not None:
            load_adapter(self.model, adapter)
        try:
            return [self._answer(prompt) for prompt in prompts]
        finally:
            if adapter is not None:
                remove_adapter(self.model)

    @torch.inference_mode()
    def _answer(self, prompt: Prompt) -> list[int]:
        inputs = self.inputs(prompt)
        answer = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        found: list[int] = answer[0, inputs["input_ids"].shape[1] :].tolist()
        return found

    @torch.inference_mode()
    def likelihoods(self, prompt: Prompt, answer: Sequence[int], adapter: Path | None = None) -> Tensor:
        """The log probabilities of all tokens at every step of a given answer: float32 [tokens, vocabulary]."""
        inputs = self.inputs(prompt)
        ids = torch.cat([inputs["input_ids"], torch.tensor([list(answer[:-1])])], 1)
        if adapter is not None:
            load_adapter(self.model, adapter)
        try:
            logits = self.model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
        finally:
            if adapter is not None:
                remove_adapter(self.model)
        found: Tensor = logits[0, -len(answer) :].float().log_softmax(-1)
        return found

    def save_peft(self, prompts: list[Prompt], folder: Path) -> list[list[int]]:
        """Save a LoRA of PEFT's for linears of every layer, and return what it answers: its weights are merged."""
        rank, alpha = 4, 8
        generator = torch.Generator().manual_seed(0)
        names = [f"layers.{number}.self_attn.q_proj" for number in range(4)]
        weights = [self.model.model.language_model.get_submodule(name).weight for name in names]
        factors, before = {}, [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for name, weight in zip(names, weights, strict=True):
                a, b = (
                    torch.randn(shape, generator=generator) * 0.3
                    for shape in ((rank, weight.shape[1]), (weight.shape[0], rank))
                )
                stored = f"base_model.model.language_model.model.{name}"
                factors |= {f"{stored}.lora_A.weight": a, f"{stored}.lora_B.weight": b}
                weight += alpha / rank * (b @ a)
            answers = self.answers(prompts)
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        folder.mkdir(exist_ok=True)
        save_file(factors, folder / "adapter_model.safetensors")
        described = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(described))
        return answers

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        images = list(prompt.images) or None
        return dict(self.processor(text=prompt.text, images=images, return_tensors="pt"))


class Engine:
    """An engine of vLLM's in this process, with few slots and a small budget of tokens.

    Args:
        folder: of the base.
        settings: that differ.
    """

    CHUNK = 40  # tokens that one pass takes at most
    BLOCK = 32  # tokens that the prefix cache holds together: the fewest on a CPU
    SLOTS = 3
    STARTED: ClassVar[list[Any]] = []  # one that ends takes the groups of ranks with it, which others here need

    def __init__(self, folder: Path, **settings: Any):
        from vllm import LLM

        usual: dict[str, Any] = {
            "dtype": "float32",
            "enable_lora": True,
            "max_loras": self.SLOTS,
            "max_cpu_loras": self.SLOTS + 1,
            "max_lora_rank": 8,
            "max_model_len": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": self.CHUNK,
            "limit_mm_per_prompt": {"image": 2},
            "block_size": self.BLOCK,
            "enforce_eager": True,
            "disable_log_stats": True,  # the counters of an engine are lost when another one begins to count
        }
        self.llm = LLM(str(folder), **usual | settings)
        self.STARTED.append(self.llm)

    def answers(self, prompts: Sequence[Prompt], adapters: Sequence[Any]) -> list[list[int]]:
        """The tokens that it answers, of all prompts in one batch.

        Args:
            adapters: a LoRARequest or None for each prompt.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        inputs = [prompt.for_vllm for prompt in prompts]
        done = self.llm.generate(inputs, sampling, lora_request=list(adapters), use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in done]

    def likely(self, prompts: Sequence[Prompt], adapters: Sequence[Any]) -> list[tuple[list[int], list[Any]]]:
        """The same with what is known of each step: the log probabilities of its likeliest tokens, by their number."""
        from vllm import SamplingParams

        # Not those of prompts: for them, where the head has slots for LoRAs, vLLM 0.32 for the CPU computes wrong
        # shapes.
        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=20)
        inputs = [prompt.for_vllm for prompt in prompts]
        done = self.llm.generate(inputs, sampling, lora_request=list(adapters), use_tqdm=False)
        found = []
        for each in done:
            (answer,) = each.outputs
            steps = [{token: of.logprob for token, of in step.items()} for step in answer.logprobs]
            found.append((list(answer.token_ids), steps))
        return found

    def counted(self, name: str) -> int:
        """A counter of vLLM's metrics."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)


@dataclass(frozen=True)
class Shared:
    """What the tests of vLLM share.

    Attributes:
        base: the exported LLaVA.
        llava: the same in LLaVA's layout.
        adapters: folders by name.
        expected: transformers' answers to `prompts`, by the adapter's name; None: the base's.
        first_number: of the requests' numbers, by which vLLM knows adapters.
    """

    base: Path
    llava: Path
    reference: Reference
    prompts: list[Prompt]
    adapters: Mapping[str, Path]
    expected: Mapping[str | None, list[list[int]]]
    first_number: int = 1

    def request(self, name: str | None) -> Any:
        """A request for an adapter, each with a number of its own."""
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        number = self.first_number + list(self.adapters).index(name)
        return LoRARequest(name, number, str(self.adapters[name]))


def differing(some: list[list[int]], others: list[list[int]]) -> int:
    return sum(one != other for one, other in zip(some, others, strict=True))
