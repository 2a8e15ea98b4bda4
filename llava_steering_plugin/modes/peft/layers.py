"""Put a layer of PEFT's on a linear of the decoder as a module that changes the linear's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.distributed import gathered
from llava_steering_plugin.modes.base import ForwardPass

# PEFT's name of an adapter on its layers: part of its parameters' names, and left out where they are saved.
NAME = "default"


@dataclass(frozen=True)
class _Call:
    """The linear that a layer of PEFT's works on in a call, and what went in and came out, in the layer's dtype.

    Attributes:
        dtype: of the linear's own inputs.
    """

    host: nn.Linear
    inputs: Tensor
    output: Tensor
    dtype: torch.dtype


_CALL: ContextVar[_Call] = ContextVar("llava_steering_peft_call")


class HostLinear(nn.Module):
    """Stands for the linear below a layer of PEFT's, which has been computed already when the layer is called.

    It holds nothing of the linear, so that threads and models may share the layer.

    Args:
        in_features, out_features: of the linear.
        shows_weight: the layer reads values of the weight (DoRA). Others read its shape, which a packed weight lacks.
    """

    def __init__(self, in_features: int, out_features: int, shows_weight: bool):
        super().__init__()
        self.in_features, self.out_features, self.shows_weight = in_features, out_features, shows_weight

    @property
    def weight(self) -> Tensor:
        if self.shows_weight:
            return _CALL.get().host.weight
        return torch.empty(self.out_features, self.in_features, device="meta", dtype=torch.float32)

    @property
    def bias(self) -> Tensor | None:
        return _CALL.get().host.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the linear's output; computed anew for other inputs than its own, which IA3 scales."""
        call = _CALL.get()
        if inputs is call.inputs:
            return call.output
        output: Tensor = call.host.forward(inputs.to(call.dtype))  # without hooks, this module's among them
        return output.to(call.output.dtype)


class TunedLinear(nn.Module):
    """Calls a layer of PEFT's on a linear's input, with the linear's output for the base's.

    Args:
        layer: of PEFT's, for one adapter of the name `NAME`.

    Shapes:
        output, inputs: of the linear, in any float dtype. PEFT's layer computes in that of its own parameters.
    """

    takes_host = True

    def __init__(self, layer: Any):
        super().__init__()
        base = layer.get_base_layer()
        layer.base_layer = HostLinear(base.in_features, base.out_features, is_dora(layer))
        self.layer = layer

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter with the name under which PEFT saves it."""
        for name, parameter in self.layer.named_parameters():
            yield ".".join(part for part in name.split(".") if part != NAME), parameter

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass, host: nn.Linear) -> Tensor:
        # OFT's rotation is in float32 also where DeepSpeed's engine has cast its parameters.
        dtype = torch.float32 if hasattr(self.layer, "oft_r") else next(self.layer.parameters()).dtype
        call = _Call(host, inputs.to(dtype), output.to(dtype), inputs.dtype)
        token = _CALL.set(call)
        try:
            result: Tensor = self.layer(call.inputs)
        finally:
            _CALL.reset(token)
        return result.to(output.dtype)


def is_dora(layer: Any) -> bool:
    """Tell whether a layer has the magnitudes of DoRA, which are those of the linear's weight at first."""
    return bool(getattr(layer, "use_dora", {}).get(NAME))


def _unpacked(host: nn.Linear) -> Tensor:
    """Return the weight of a linear of bitsandbytes', which holds it as bytes, in float32."""
    from peft.utils.integrations import dequantize_bnb_weight  # imports bitsandbytes, which need not be there

    weight: Tensor = dequantize_bnb_weight(host.weight, state=getattr(host, "state", None))
    return weight.detach().float()


@torch.no_grad()
def start_dora(module: TunedLinear, host: nn.Linear) -> None:
    """Set the magnitudes of a fresh layer to those of its linear's weight, in float32."""
    stand_in = module.layer.base_layer
    packed: Any = host.weight
    with gathered([packed]):
        weight = packed.detach().float() if packed.is_floating_point() else _unpacked(host)
    plain = nn.Linear(host.in_features, host.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    module.layer.to(weight.device)
    module.layer.base_layer = plain
    try:
        if hasattr(module.layer, "dora_init"):
            module.layer.dora_init(NAME)
        else:  # a newer PEFT than LLaVA's pins take
            module.layer.lora_variant[NAME].init(module.layer, adapter_name=NAME)
    finally:
        module.layer.base_layer = stand_in
