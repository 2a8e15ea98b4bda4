"""Prepare tokenizers other than Llama's for LLaVA, which counts on what Llama's does."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from llava_steering_plugin.components.chat_format import begins_texts

# What a prepared tokenizer carries: the name of its component.
_PREPARED = "llava_language_model"


def prepared(tokenizer: Any, component: str) -> Any:
    """Return the tokenizer, changed so that LLaVA's code does with it what it does with Llama's.

    - LLaVA pads with `unk_token`. Where there is none, it becomes what the tokenizer pads with, or ends texts with.
    - LLaVA drops the first token behind every image if a prompt begins with `bos_token`, because a tokenizer that puts
      it there would do so behind images too. One that does not put it there itself loses its `bos_token`: a template
      may begin with it, as SmolLM2's does.
    """
    if tokenizer.unk_token is None:
        tokenizer.unk_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.bos_token is not None and not begins_texts(tokenizer):
        tokenizer.bos_token = None
    setattr(tokenizer, _PREPARED, component)
    return tokenizer


def is_prepared(tokenizer: Any) -> bool:
    """Return whether `prepared` has changed a tokenizer."""
    return hasattr(tokenizer, _PREPARED)


def attend_to_ends(original: Callable[..., Any], collator: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Wrap the call of LLaVA's collator: for prepared tokenizers, attend to all of a sample and to no padding.

    LLaVA takes every token that is used for padding for padding. Where a model ends its turns with that token, as Phi-2
    does, it would never see an end.
    """
    instances = args[0] if args else kwargs["instances"]
    batch = original(*args, **kwargs)
    if is_prepared(collator.tokenizer):
        lengths = torch.tensor([len(instance["input_ids"]) for instance in instances])
        batch["attention_mask"] = torch.arange(batch["input_ids"].shape[1])[None] < lengths[:, None]
    return batch


class Tokenizers:
    """Stands for transformers' AutoTokenizer in LLaVA's modules, while one of them works with a component.

    Args:
        original: AutoTokenizer.
        component: its name.
    """

    def __init__(self, original: Any, component: str):
        self.original, self.component = original, component

    def from_pretrained(self, *args: Any, use_fast: bool = True, **kwargs: Any) -> Any:
        """Load a tokenizer, a fast one if there is one: some come in no other kind, and LLaVA asks for slow ones."""
        return prepared(self.original.from_pretrained(*args, **kwargs), self.component)


class WithTokenizers:
    """Stands for the module `transformers` in llava.train.train: the same, with another AutoTokenizer."""

    def __init__(self, original: ModuleType, component: str):
        self._original = original
        self.AutoTokenizer = Tokenizers(original.AutoTokenizer, component)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
