"""Build what the benchmark of transformers' own Llava times: frozen, with MoReS, with LoRA, on the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin import attachment_of, get_model
from llava_steering_plugin.hooks.scope import entered, opened
from llava_steering_plugin.modes.mores import MoReS

from .shared.beside_frozen import CONTROL, FROZEN
from .shared.frozen_llama import VOCABULARY, Case, clone

IMAGE = VOCABULARY - 1  # the placeholder
PATCH = 14
RANK = 8  # of LoRA
LORA = f"PEFT LoRA rank {RANK}, all linears"
SCALE = 0.02  # of the adapters' weights, so that no branch of them is zero


class Variant:
    """A model with its batch, what of it is trained, and the cache of a prefill."""

    def __init__(self, model: Any, batch: dict[str, Tensor]):
        self.model, self.batch = model, batch
        self.labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
        self.token = torch.zeros(len(self.labels), 1, dtype=torch.long)
        trained = [each for each in model.parameters() if each.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(0, SCALE)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
        attachment = attachment_of(model)
        # The scope that `generate` opens for a prefill and all decode steps after it.
        self._scope = None if attachment is None else opened(attachment, generating=True)
        with torch.no_grad(), self._generating():
            self.cache = getattr(model(**batch, use_cache=True), _cache_name())
        self._past = {_cache_name(): self.cache}

    def train(self) -> None:
        """Run a training step: forward, backward, and AdamW where something is trained."""
        self._set_training(True)
        self.model(**self.batch, labels=self.labels, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def decode(self) -> None:
        """Run one step over the prefill's cache, and leave that as it was."""
        self.next_logits(self.token)

    def next_logits(self, token: Tensor) -> Tensor:
        """Return the logits [rows, 1, vocabulary] after `token` [rows, 1], which follows the prompt."""
        self._set_training(False)
        with torch.no_grad(), self._generating():
            logits: Tensor = self.model(input_ids=token, use_cache=True, **self._past).logits
        self.cache.crop(-1)
        return logits

    def _set_training(self, training: bool) -> None:
        if self.model.training is not training:
            self.model.train(training)

    def _generating(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._scope is None else entered(self._scope)


def _cache_name() -> str:
    """Return what the cache is called in calls and in their results: from transformers 5.24 on, `cache`."""
    from transformers import LlavaForConditionalGeneration

    return "cache" if "cache" in signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"


def variants(case: Case, settings: tuple[MoReS, ...], dtype: torch.dtype) -> dict[str, Variant]:
    """Return the frozen model, the control, one model for each setting, and one with LoRA, over the same weights.

    The text embeddings have a gradient in all of them, as a trained projector would need it: the frozen model is
    differentiated, too.
    """
    model, batch = frozen_llava(case, dtype), batch_of(case, dtype)
    made = {FROZEN: Variant(model, batch)}
    puts: dict[str, Callable[[Any], Any]] = {
        f"MoReS rank {mode.rank}, {mode.tokens} of the tokens": partial(get_model, mode=mode) for mode in settings
    }
    for number, (name, put) in enumerate((puts | {LORA: _with_lora}).items()):
        if number == len(settings) // 2:
            # Half a round after the frozen model, so that the two cover the whole round.
            made[CONTROL] = Variant(clone(model), batch)
        made[name] = Variant(put(clone(model)), batch)
    return made


def frozen_llava(case: Case, dtype: torch.dtype) -> Any:
    """Return a LlavaForConditionalGeneration whose decoder has the case's shapes, with the same weights every time.

    The vision tower is small: it is the same for all variants, and would hide what they add to the decoder.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=_side(case),
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=case.width,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.heads,
        ),
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(_with_gradient)
    return model


def batch_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return prompts that are an image and text after it, as a processor would: ids, attention mask and pixels."""
    ids = torch.randint(IMAGE, (case.batch, case.positions))
    ids[:, : case.visual] = IMAGE
    pixels = torch.randn(case.batch, 3, _side(case), _side(case)).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _side(case: Case) -> int:
    """Return the width of a square image that becomes the case's number of visual tokens."""
    return PATCH * math.isqrt(case.visual)


def _with_gradient(embedding: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(torch.is_grad_enabled())


def _with_lora(model: Any) -> Any:
    """Put LoRA on every linear of the decoder, as LLaVA does."""
    from peft import LoraConfig, get_peft_model

    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "vision_tower" not in name
    ]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears, task_type="CAUSAL_LM"))
