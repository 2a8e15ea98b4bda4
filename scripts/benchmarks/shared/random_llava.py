"""Build upstream's LLaVA with random weights: in memory, on any device, or as a folder that upstream loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_utils import no_init_weights

WORDS = [a + b for a in ("ba", "do", "ki", "lu", "me") for b in ("ra", "so", "ti", "nu", "ge")]


@dataclass(frozen=True)
class Shape:
    """The shape of a LLaVA.

    Attributes:
        width, inner, layers, heads, vocabulary: of the language model.
        tower_width, tower_inner, tower_layers, tower_heads, side, patch: of the CLIP vision tower.
    """

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    tower_width: int
    tower_inner: int
    tower_layers: int
    tower_heads: int
    side: int
    patch: int


def save_tokenizer(folder: Path) -> Any:
    """Save a Llama tokenizer of about 400 pieces, which knows `WORDS`, in `folder`, and return it."""
    import sentencepiece
    from transformers import LlamaTokenizer

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS), "USER: ASSISTANT: A chat between a human and an assistant."] * 50),
            model_writer=file,
            vocab_size=400,
            hard_vocab_limit=False,
            # As Llama's: another one loses spaces, and LLaVA's prompts would not be those of an exported base.
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save(shape: Shape, folder: Path, tower: Path) -> None:
    """Save a random LLaVA without a tokenizer in `folder`, in float16, and its vision tower in `tower`."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    save_processor(shape, tower)
    CLIPVisionModel(_tower_config(shape)).save_pretrained(tower)
    LlavaLlamaForCausalLM(_config(shape, tower)).half().save_pretrained(folder)


def build(shape: Shape, device: torch.device, bits: int) -> Any:
    """Return a frozen LLaVA in bf16 with its vision tower, made on `device`. No large file is written.

    Args:
        bits: 16, or 4 for linears that are packed as upstream's --bits 4 packs them.
    """
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    tower = _tower_config(shape)
    with tempfile.TemporaryDirectory(prefix="clip-") as folder:
        tower.save_pretrained(folder)
        save_processor(shape, Path(folder))
        config = _config(shape, Path(folder), max_position_embeddings=4096, tokenizer_padding_side="right")
        with _made_on(device):
            model: Any = LlavaLlamaForCausalLM(config)
            model.get_vision_tower().vision_tower = CLIPVisionModel(tower)
    model.get_vision_tower().is_loaded = True
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1 if name.endswith("weight") else 0)
            else:
                parameter.normal_(0, 0.02)
    model.requires_grad_(False)
    if bits == 4:
        pack(model, device)
    return model


def pack(model: Any, device: torch.device) -> None:
    """Pack every linear of the language model as nf4 with double quantisation; cast the norms to float32."""
    import bitsandbytes
    from peft import prepare_model_for_kbit_training

    if device.type == "cpu":
        # Otherwise an evaluation repacks the weights for good, and later training steps get no gradient from them.
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    outside = ("vision_tower", "mm_projector")
    # Names only: a list of the linears would keep every unpacked weight until the last one is packed.
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in outside)
    ]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, _packed(getattr(owner, leaf), device))
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.get_input_embeddings().to(torch.bfloat16)
    for outer in ("mm_projector", "vision_tower"):
        getattr(model.get_model(), outer).to(torch.bfloat16)


def _tower_config(shape: Shape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=shape.tower_inner,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.side,
        patch_size=shape.patch,
    )


def save_processor(shape: Shape, folder: Path) -> Any:
    """Save the image processor of a vision tower in `folder`, and return it."""
    crop = {"height": shape.side, "width": shape.side}
    processor = CLIPImageProcessor(size={"shortest_edge": shape.side}, crop_size=crop)
    processor.save_pretrained(folder)
    return processor


def _config(shape: Shape, tower: Path, **more: Any) -> Any:
    """Return LLaVA's config.

    Args:
        tower: folder of the vision tower. Upstream takes any existing path for a CLIP.
        more: further values.
    """
    from llava.model.language_model.llava_llama import LlavaConfig

    return LlavaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        mm_vision_tower=str(tower),
        mm_hidden_size=shape.tower_width,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        **more,
    )


@contextmanager
def _made_on(device: torch.device) -> Iterator[None]:
    """Make parameters in bf16 on `device`, without drawing them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _packed(linear: nn.Linear, device: torch.device) -> nn.Module:
    import bitsandbytes

    # On the meta device no random weights are drawn: its own weight is thrown away at once.
    packed: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    packed.weight = weight.to(device)  # this packs it
    return packed
