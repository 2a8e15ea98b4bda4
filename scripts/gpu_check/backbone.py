"""Upstream's LLaVA with random weights, made where it runs: no file is downloaded, and none is larger than a config."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sizes import Size
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_utils import no_init_weights


def build(size: Size, device: torch.device, bits: int) -> Any:
    """A LLaVA in bf16 with its vision tower; with `bits` 4, its linears as upstream's --bits 4 packs them.

    Frozen, and prepared for gradient checkpointing.
    """
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    tower = CLIPVisionConfig(
        hidden_size=size.tower_width,
        intermediate_size=size.tower_inner,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=size.side,
        patch_size=size.patch,
    )
    with tempfile.TemporaryDirectory(prefix="clip-") as folder:
        tower.save_pretrained(folder)
        edge = {"height": size.side, "width": size.side}
        CLIPImageProcessor(size={"shortest_edge": size.side}, crop_size=edge).save_pretrained(folder)
        config = LlavaConfig(
            hidden_size=size.width,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=size.vocabulary,
            max_position_embeddings=4096,
            mm_vision_tower=_named_clip(Path(folder)),
            mm_hidden_size=size.tower_width,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            tokenizer_padding_side="right",
        )
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
        _pack(model, device)
    return model


def _named_clip(folder: Path) -> str:
    # Upstream takes any existing path for a CLIP.
    return str(folder)


@contextmanager
def _made_on(device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _pack(model: Any, device: torch.device) -> None:
    """nf4 with double quantisation for every linear of the language model, norms in float32: as training has them."""
    import bitsandbytes
    from peft import prepare_model_for_kbit_training

    if device.type == "cpu":
        # Else an evaluation repacks the weights for good, and a training step after it gets no gradient from them.
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


def _packed(linear: nn.Linear, device: torch.device) -> nn.Module:
    import bitsandbytes

    # On the meta device nothing is drawn: its own weight is thrown away at once.
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
    packed.weight = weight.to(device)  # that is when it is packed
    return packed
