"""Build what the MixLoRA benchmark compares: one linear and the seven of a block, frozen and adapted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from llava_steering_plugin.hooks.hosts import hang
from llava_steering_plugin.hooks.scope import Scope, entered
from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear

T = TypeVar("T", bound="Hosted")

SETTINGS = MixLoRA()
RANK = SETTINGS.rank
HIDDEN, INTERMEDIATE = 4096, 11008


class DenseDelta(RoutedLinear):
    """Route in the same way, and compute the update as a full matrix for every row: [rows, in, out]."""

    takes_backward = False

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass, weight: Tensor | None = None) -> Tensor:
        a, b = self.factors_for(inputs, this_pass, output.dtype)
        return output + torch.matmul(inputs, torch.matmul(a.transpose(1, 2), b))


class Hosted(nn.Module):
    """Run layers as the plugin does: modules attached to linears, a scope around every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = Scope(generating=True)

    def prefill(self, hidden: Tensor) -> Tensor:
        self.scope.kept.clear()
        return self._run(hidden, decode=False)

    def decode(self, hidden: Tensor) -> Tensor:
        return self._run(hidden, decode=True)

    def _run(self, hidden: Tensor, decode: bool) -> Tensor:
        there = torch.ones(hidden.shape[:2], dtype=torch.bool)
        self.scope.this_pass = ForwardPass(~there, there, there, decode, self.scope.kept)
        with entered(self.scope):
            result: Tensor = self(hidden)
        return result


class Layer(Hosted):
    """One linear."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.linear(hidden)
        return result


class Block(Hosted):
    """The seven linears of a Llama layer, without its attention."""

    def __init__(self, linears: Mapping[str, nn.Module]):
        super().__init__()
        self.linears = nn.ModuleDict(linears)
        self.width = HIDDEN

    def forward(self, hidden: Tensor) -> Tensor:
        on = self.linears
        hidden = on["o"](on["q"](hidden) + on["k"](hidden) + on["v"](hidden))
        result: Tensor = on["down"](nn.functional.silu(on["gate"](hidden)) * on["up"](hidden))
        return result


BLOCK_SHAPES = {
    **dict.fromkeys(("q", "k", "v", "o"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("gate", "up"), (HIDDEN, INTERMEDIATE)),
    "down": (INTERMEDIATE, HIDDEN),
}
KINDS = ("frozen", "control", "mixlora", "peft", "dense delta")


def layers(in_features: int, out_features: int, dtype: torch.dtype) -> dict[str, Layer]:
    """Return one linear in every variant, in training mode, over one weight in memory."""
    weight = frozen(in_features, out_features, dtype)
    return {kind: _adapted(Layer(_linear(kind, weight)), kind).train() for kind in KINDS}


def block(dtype: torch.dtype) -> dict[str, Block]:
    """Return a block's seven linears in every variant except the dense one, in eval mode."""
    weights = {name: frozen(*shape, dtype) for name, shape in BLOCK_SHAPES.items()}
    made = {}
    for kind in KINDS[:-1]:
        linears = Block({name: _linear(kind, weight) for name, weight in weights.items()})
        made[kind] = _adapted(linears, kind).eval()
    return made


def frozen(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Parameter:
    """Return a random frozen weight [out, in]."""
    return nn.Parameter((torch.randn(out_features, in_features) / in_features**0.5).to(dtype), requires_grad=False)


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters that are trained."""
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


def _linear(kind: str, weight: nn.Parameter) -> nn.Module:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = weight
    if kind != "peft":
        return linear
    lora = LoraLinear(linear, "default", r=RANK, lora_alpha=2 * SETTINGS.factors, lora_dropout=0.0)
    weight.requires_grad_(False)
    # As in LLaVA's own script: the adapter has the model's data type.
    lora.lora_A.to(weight.dtype), lora.lora_B.to(weight.dtype)
    nn.init.normal_(lora.lora_B["default"].weight, std=0.01)
    adapted: nn.Module = lora
    return adapted


def _adapted(hosted: T, kind: str) -> T:
    modules = {"mixlora": RoutedLinear, "dense delta": DenseDelta}
    if kind in modules:
        linears = {path: child for path, child in hosted.named_modules() if isinstance(child, nn.Linear)}
        balance = SETTINGS.balance_weight / (2 * len(linears))
        made = {
            path: modules[kind](linear.in_features, linear.out_features, SETTINGS, balance)
            for path, linear in linears.items()
        }
        for module in made.values():
            nn.init.normal_(module.routed_b, std=0.01)
        hang(hosted, dict(made))
    return hosted


def forward_backward(layer: Layer, hidden: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return a call that runs forward + backward and leaves no gradient behind."""

    def call() -> None:
        torch.autograd.backward(layer.prefill(hidden), gradient)
        hidden.grad = None
        for parameter in trained(layer):
            parameter.grad = None

    return call


def peak_bytes(call: Callable[[], None]) -> int:
    """Return the peak of the memory that `call` allocates, in bytes, on the CPU."""
    call()
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak
