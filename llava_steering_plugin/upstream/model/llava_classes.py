"""Make the LLaVA of any causal language model: transformers' own class, with what LLaVA adds to Llama's.

LLaVA writes the same classes once for each language model. Here they are made: the decoder with LlavaMetaModel, the
whole with LlavaMetaForCausalLM, and `forward`, `generate` and `prepare_inputs_for_generation` are the functions of
LLaVA's LlavaLlamaForCausalLM themselves, with another class behind their `super()`. What a fork changes in them changes
here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from types import CellType, FunctionType
from typing import Any

import torch

from llava_steering_plugin.upstream.seams import require


@functools.cache
def llava_class(causal: Any, model_type: str) -> Any:
    """Return the LLaVA of a causal language model; one class for each, known to transformers' AutoConfig and AutoModel.

    Where the LLaVA that is installed has one of this model type already, it is that one.

    Args:
        causal: a class of transformers, such as Qwen2ForCausalLM. Its decoder is the attribute `model`, which has
            `embed_tokens`: LLaVA looks for them by these names.
        model_type: of the LLaVA, for config.json, such as "llava_qwen2".

    Raises:
        UpstreamError: this LLaVA lacks a name that is needed.
        ImportError: there is no LLaVA.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    llama, arch = import_module("llava.model.language_model.llava_llama"), import_module("llava.model.llava_arch")
    original = require(llama, "LlavaLlamaForCausalLM")
    seeing, splicing = require(arch, "LlavaMetaModel"), require(arch, "LlavaMetaForCausalLM")
    if model_type in CONFIG_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    stem = f"Llava{causal.__name__.removesuffix('ForCausalLM')}"
    config = type(f"{stem}Config", (causal.config_class,), {"model_type": model_type, "__module__": __name__})

    @functools.wraps(causal.__init__)
    def build(self: Any, settings: Any, *args: Any, **kwargs: Any) -> None:
        causal.__init__(self, settings, *args, **kwargs)
        decoder: Any = type(self.model)
        self.model.__class__ = _decoder_class(decoder, seeing, f"{stem}Model")
        self.model.__init__(settings)

    this_class = CellType()
    added = (
        require(llama, "LlavaLlamaForCausalLM.get_model"),
        require(llama, "LlavaLlamaForCausalLM.forward"),
        require(llama, "LlavaLlamaForCausalLM.generate"),
        require(llama, "LlavaLlamaForCausalLM.prepare_inputs_for_generation"),
    )
    members: dict[str, Any] = {method.__name__: _behind(method, this_class) for method in added}
    prepare = members["prepare_inputs_for_generation"]
    members["prepare_inputs_for_generation"] = _for_forward(prepare, members["forward"])
    members["encode_images"] = _in_the_embeddings_dtype(require(arch, "LlavaMetaForCausalLM.encode_images"))
    members |= {"__init__": build, "resize_token_embeddings": _never_fewer(causal), "__module__": __name__}
    members["from_pretrained"] = classmethod(_with_whole_embeddings(causal))
    whole = type(original)(f"{stem}ForCausalLM", (causal, splicing), members)
    this_class.cell_contents = whole
    whole.config_class = config
    AutoConfig.register(model_type, config)
    AutoModelForCausalLM.register(config, whole)
    return whole


class _Built:
    """Stands between LlavaMetaModel and a decoder that is there already, so that the tower and projector join it.

    LlavaMetaModel builds them after `super().__init__(config)`, which would make a second decoder.
    """

    def __init__(self, config: Any):
        pass


@functools.cache
def _decoder_class(decoder: Any, seeing: Any, name: str) -> type:
    return type(name, (seeing, _Built, decoder), {"__module__": __name__})


def _behind(method: Callable[..., Any], this_class: CellType) -> Callable[..., Any]:
    """Return a method of LLaVA's for the class in the cell: `super()` in it means the parents of that class."""
    plain = inspect.unwrap(method)
    cells = dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True))
    cells |= {"__class__": this_class} if "__class__" in cells else {}
    moved = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, tuple(cells.values()))
    moved.__kwdefaults__, moved.__annotations__ = plain.__kwdefaults__, plain.__annotations__
    moved.__doc__ = plain.__doc__
    # LLaVA decorates `generate` alone, with this.
    return moved if plain is method else torch.no_grad()(moved)


def _never_fewer(causal: Any) -> Callable[..., Any]:
    """Keep rows without a token: LLaVA's loader cuts the embeddings to its tokenizer, and its training does not.

    Qwen's and Phi-2's models have some hundred such rows, which take part in what a model says is likely.
    """

    @functools.wraps(causal.resize_token_embeddings)
    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if new_num_tokens is not None:
            new_num_tokens = max(new_num_tokens, self.get_input_embeddings().num_embeddings)
        return causal.resize_token_embeddings(self, new_num_tokens, *args, **kwargs)

    return resize_token_embeddings


def _with_whole_embeddings(causal: Any) -> Callable[..., Any]:
    """Leave the head unpacked where it is the embeddings: LLaVA's training would pack all linears but the projector."""

    @functools.wraps(causal.from_pretrained.__func__)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        packing: Any = kwargs.get("quantization_config")
        skipped = getattr(packing, "llm_int8_skip_modules", None)
        if skipped is not None and "lm_head" not in skipped:
            config = kwargs.get("config") or cls.config_class.from_pretrained(name)
            if config.tie_word_embeddings:
                packing.llm_int8_skip_modules = [*skipped, "lm_head"]
        return causal.from_pretrained.__func__(cls, name, *args, **kwargs)

    return from_pretrained


def _in_the_embeddings_dtype(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Give images the dtype of the words between which they are put.

    A training has the tower's features in float32. LLaVA's `identity` hands them on as they are, and a decoder that
    begins with a layer norm in bfloat16, as Phi's, does not take them on the CPU.
    """

    @functools.wraps(encode)
    def encode_images(self: Any, images: Any) -> Any:
        return encode(self, images).to(self.get_input_embeddings().weight.dtype)

    return encode_images


def _for_forward(prepare: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Leave out what LLaVA's forward does not take: transformers from 4.38 on gives `cache_position` too."""
    taken = inspect.signature(forward).parameters

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in prepare(*args, **kwargs).items() if name in taken}

    return prepare_inputs_for_generation
