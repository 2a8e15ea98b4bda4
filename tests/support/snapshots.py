"""Everything of a model and its tokenizer that an adapter could change, in a form that compares to the bit."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

# Where torch keeps what is looked at by itself.
INNER = ("_parameters", "_buffers", "_modules", "_is_full_backward_hook")
SENTENCE = "USER: <im_start> What color is <im_patch> this [PAD]? <im_end> ASSISTANT: It is red.</s>"


def snapshot(model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Return what there is by name; two snapshots are compared by `differences`."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"module {name}"] = (type(module).__qualname__, module.training, module.extra_repr())
        for key, value in vars(module).items():
            if key.endswith("_hooks") or "_hooks_" in key:
                found[f"{name}.{key}"] = len(value)
            elif key not in INNER and not isinstance(value, nn.Module):
                found[f"{name}.{key}"] = described(value)
    for kind in ("parameters", "buffers"):
        for name, value in getattr(model, f"named_{kind}")():
            found[f"{kind} {name}"] = (type(value), value.dtype, value.device, value.shape, value.requires_grad)
            found[f"values of {name}"] = value.detach().clone()
    for part in ("config", "generation_config"):
        found[part] = json.dumps(getattr(model, part).to_dict(), sort_keys=True, default=str)
        found[f"keys of {part}"] = sorted(vars(getattr(model, part)))
    if tokenizer is not None:
        found["vocabulary"] = (tokenizer.get_vocab(), dict(tokenizer.get_added_vocab()), len(tokenizer))
        found["special tokens"] = (tokenizer.special_tokens_map, tokenizer.all_special_tokens)
        found["ids"] = tokenizer(SENTENCE).input_ids
        found["tokenizer"] = {key: described(value) for key, value in vars(tokenizer).items()}
    return found


def described(value: Any) -> Any:
    """Return a value that compares: a config by its entries, functions and other objects by their names."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, str | int | float | bool | bytes | type(None) | tuple | list | dict | set):
        return repr(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return type(value).__qualname__


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what is not the same, sorted."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not _same(before[name], after[name])
    )


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, Tensor) and isinstance(there, Tensor):
        # To the bit: a NaN is equal to itself, 0.0 is not equal to -0.0.
        return (
            here.dtype == there.dtype
            and here.shape == there.shape
            and torch.equal(*(each.cpu().contiguous().reshape(-1).view(torch.uint8) for each in (here, there)))
        )
    return bool(here == there)
