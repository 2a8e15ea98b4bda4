"""The tiny LLaVA in this process, inputs for it, an adapter whose effect is plain to see, and steering done by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_llava import HIDDEN, IMAGE_SIDE, VISUAL_TOKENS
from torch import Tensor

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.mores import Steering

IMAGE = -200  # upstream's IMAGE_TOKEN_INDEX, the placeholder of an image among the token ids
IGNORED = -100
NEW = 6  # tokens that `generate` makes


def load_llava(folder: Path, **overrides: Any) -> Any:
    """The LLaVA in `folder` with its tower, in float32 and eval mode; `overrides` go into its config."""
    from llava.model import LlavaLlamaForCausalLM

    config = LlavaLlamaForCausalLM.config_class.from_pretrained(folder)
    config.update(overrides)
    model = LlavaLlamaForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    return model.float().eval()


def strengthen(attachment: Attachment, seed: int = 0, size: float = 0.3) -> Attachment:
    """Moves a fresh adapter far from the identity: what it steers comes out visibly different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return attachment


def away_from_identity(module: torch.nn.Module) -> None:
    """The same for a module by itself, with torch's own generator."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def pictures(count: int, seed: int = 0) -> Tensor:
    """Pixels of `count` different pictures, [count, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)


def words(count: int, seed: int = 0) -> list[int]:
    """Ids of `count` pieces that are neither control nor byte pieces."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(260, 600, (count,), generator=generator).tolist()


def mask_of(*rows: tuple[int, int, int]) -> Tensor:
    """bool [rows, positions]; each row is given as (positions before, visual positions, positions after)."""
    return torch.stack(
        [torch.tensor([0] * before + [1] * visual + [0] * after).bool() for before, visual, after in rows]
    )


def generate(model: Any, ids: Tensor, images: Tensor | None, **options: Any) -> list[list[int]]:
    """Exactly `NEW` tokens, from the same seed."""
    torch.manual_seed(0)
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.inference_mode():
        return model.generate(ids, images=images, use_cache=True, **(length | options)).tolist()


def logits_of(model: Any, ids: Tensor, images: Tensor | None, **rest: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, images=images, **rest).logits


def base_of(**sizes: int) -> Any:
    """A Llama of the tiny LLaVA's sizes, or others, and with other weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(9)
    tiny = {"vocab_size": 700, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**(tiny | {"num_attention_heads": 4} | sizes))).eval()


def traces(model: torch.nn.Module) -> tuple[Any, ...]:
    """All that an adapter leaves on a model."""
    hooks = [(name, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()]
    return hooks, sorted(model.__dict__), {name: value.shape for name, value in model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    """The files in `folder` by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def ids_of(*rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows)


# A prompt with its picture after 3 pieces and 4 pieces behind it; and text of the same length once that is spliced in.
BEFORE, AFTER = 3, 4
PROMPT = [1, *words(BEFORE - 1), IMAGE, *words(AFTER, seed=1)]
TEXT = [1, *words(BEFORE + VISUAL_TOKENS + AFTER - 1, seed=2)]


class ByHand:
    """The formula of MoReS, one token at a time, with the weights of an adapter and a mask worked out by hand."""

    def __init__(self, attachment: Attachment):
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []
        for module in attachment.modules.values():
            steering = module.get_submodule("vis")
            assert isinstance(steering, Steering)
            parts = steering.basis(), steering.steer_shift, steering.steer_offset
            self.layers.append(tuple(part.detach().clone() for part in parts))

    @contextmanager
    def steering(self, model: Any, chosen: Tensor) -> Iterator[None]:
        """Steers the positions `chosen` [rows, positions] in every pass but decode steps.

        `model` carries no adapter. Rows that `generate` repeats follow each other; positions beyond the mask are new.
        """
        handles = [
            layer.register_forward_hook(self._hook(weights, chosen))
            for layer, weights in zip(model.model.layers, self.layers, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(weights: tuple[Tensor, Tensor, Tensor], chosen: Tensor) -> Any:
        basis, shift, offset = weights

        def hook(layer: Any, args: Any, output: tuple[Any, ...]) -> Any:
            hidden = output[0].clone()
            if hidden.shape[1] == 1:
                return None
            repeats = hidden.shape[0] // chosen.shape[0]
            for row in range(hidden.shape[0]):
                for position in chosen[row // repeats].nonzero().flatten().tolist():
                    token = output[0][row, position]
                    hidden[row, position] = token + basis.T @ (shift @ token + offset)
            return (hidden, *output[1:])

        return hook
