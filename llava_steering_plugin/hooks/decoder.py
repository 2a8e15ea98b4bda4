"""Find a model's decoder stack by its structure, never by the model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.modes.base import DecoderShape, LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, DecoderShape]:
    """Return the decoder stack of a Hugging Face causal model, and its shape.

    The layers are the shallowest list of `num_hidden_layers` modules in the stack.

    Raises:
        SteeringError: there is no such list, or there are several at the same depth; or the model is of no family.
    """
    family = family_of(model)
    config, stack = family.text_config, family.decoder()
    layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (path.count("."), path, module)
        for path, module in stack.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    shallowest = [entry for entry in lists if entry[0] == min(lists)[0]] if lists else []
    if len(shallowest) != 1:
        raise SteeringError(
            f"{type(model).__name__}: expected one list of {layers} decoder layers in {type(stack).__name__}, found "
            f"{', '.join(path for _, path, _ in shallowest) or 'none'}. Only decoder-only language models can be tuned."
        )
    _, path, found = shallowest[0]
    shapes = tuple(
        LayerShape(f"{path}.{number}", _linears(f"{path}.{number}", layer)) for number, layer in enumerate(found)
    )
    where = next((name for name, module in model.named_modules() if module is stack), "")
    return stack, DecoderShape(int(config.hidden_size), shapes, where)


def _linears(prefix: str, layer: nn.Module) -> dict[str, tuple[int, int]]:
    # bitsandbytes' quantised linears are subclasses of nn.Linear. Their weights are packed, so the widths come from
    # the features and not from the weights' shapes.
    return {
        f"{prefix}.{path}": (module.in_features, module.out_features)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
