"""MoReS: low-rank linear steering of visual tokens (LLaVA Steering, arXiv 2412.12359, eq. 3-4).

    h' = h + R^T (W h + b - R h) = h + R^T (M h + b),   M = W - R,   rows of R orthonormal

The update of a hidden state lives in the d-dimensional subspace that R spans. M is learned directly, which saves a
matrix product, and M = b = 0 is the identity to start from. The paper's W is `M + R`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import (
    DecoderShape,
    ForwardPass,
    Mode,
    largest_in,
    no_autocast,
    setting,
)
from llava_steering_plugin.modes.mores_frames import Basis, Frames, orthonormal
from llava_steering_plugin.modes.mores_selection import TokenSelection, parse_layers

# How far R R^T may be from I. Measured: 3e-8 at most up to a condition number of 1e4, 1e-6 at 1e5, 1e-2 at 1e7.
ORTHONORMAL = 1e-5
TRIED = 64  # random hidden states that a saved adapter is tried on
# The paper's 1% of 576 tokens. A percentage that comes to fewer is hardly what was meant.
FEW_TOKENS = 6
MODALITIES = {"vis": ("vis",), "text": ("text",), "vis+text": ("vis", "text")}


class Steering(nn.Module):
    """Computes the update R^T (M h + b) of hidden states h (eq. 3-4), inside a learned `rank`-dimensional subspace.

    Args:
        hidden_size: D, width of the residual stream.
        rank: d <= D, dimension of the subspace; 1 is the paper's smallest setting.
        dropout: probability of dropping an element of the update while training.

    Shapes:
        hidden: [tokens, D] in any float dtype. Computed in float32; the update, without h, has the input's dtype.
    """

    def __init__(self, hidden_size: int, rank: int, dropout: float = 0.0):
        super().__init__()
        self.steer_basis = nn.Parameter(torch.empty(rank, hidden_size, dtype=torch.float32))
        self.steer_shift = nn.Parameter(torch.zeros(rank, hidden_size, dtype=torch.float32))
        self.steer_offset = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        nn.init.orthogonal_(self.steer_basis)
        self.frames = Frames([self])

    def basis(self, this_pass: ForwardPass | None = None) -> Tensor:
        """Return R, float32 [rank, D] with orthonormal rows, made from the unconstrained parameter.

        Args:
            this_pass: in which those of all layers are made at once.
        """
        made = orthonormal(self.steer_basis) if this_pass is None else self.frames.of(self, this_pass)
        basis: Tensor = Basis.apply(self.steer_basis, *made)  # type: ignore[no-untyped-call]
        return basis

    def forward(self, hidden: Tensor, this_pass: ForwardPass | None = None) -> Tensor:
        with no_autocast(hidden.device):
            shifted = nn.functional.linear(hidden.float(), self.steer_shift.float(), self.steer_offset.float())
            update: Tensor = self.dropout(shifted @ self.basis(this_pass))
        return update.to(hidden.dtype)

    def train(self, mode: bool = True) -> Steering:
        self.frames.forget(self)  # some optimizers write through `.data`, which torch does not count as a change
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.frames.forget(self)  # what was kept would stay behind on another device
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def set_paper_weights(self, rotation: Tensor, weight: Tensor, offset: Tensor) -> None:
        """Set the parameters from the paper's R [rank, D] with orthonormal rows, W [rank, D] and b [rank]."""
        self.steer_basis.copy_(rotation)
        # R as `basis()` returns it, so that M + R is the given W to the last bit that float32 holds.
        self.steer_shift.copy_(weight - self.basis())
        self.steer_offset.copy_(offset)


class _Pick(torch.autograd.Function):
    """Return the hidden states, and a copy of those that are to be updated.

    `index_select` alone does the same, but its gradient is as large as all hidden states and zero except for a few
    rows, and autograd adds it to theirs: more memory traffic than all the rest of MoReS' backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(chosen)
        return hidden.view_as(hidden), hidden.index_select(0, chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        whole, picked = gradients
        return whole.index_add(0, chosen, picked), None


class SteeredLayer(nn.Module):
    """Steers the selected tokens of a decoder layer's output, with one `Steering` for each modality.

    Samples without an image are not steered, and decode steps change nothing. The modules run on zero rows too, so that
    every parameter has a gradient in every training pass.

    Args:
        selection: which tokens of a modality are steered.
        steerings: by modality, "vis" or "text".

    Shapes:
        output: [rows, positions, D] in any float dtype.
    """

    reads_inputs: ClassVar[bool] = False

    def __init__(self, selection: TokenSelection, steerings: dict[str, Steering]):
        super().__init__()
        self.selection = selection
        for modality, steering in steerings.items():
            self.add_module(modality, steering)

    def forward(self, output: Tensor, inputs: object, this_pass: ForwardPass) -> Tensor:
        if this_pass.decode:
            return output
        hidden = output.flatten(0, 1)
        for modality, steering in self.named_children():
            chosen = self.chosen(this_pass, modality, output.device)
            hidden, picked = _Pick.apply(hidden, chosen)  # type: ignore[no-untyped-call]
            hidden = hidden.index_add(0, chosen, steering(picked, this_pass))
        return hidden.view_as(output)

    def chosen(self, this_pass: ForwardPass, modality: str, device: torch.device) -> Tensor:
        """Return the numbers of the selected positions among the flattened [rows * positions]; int64 [tokens]."""

        def choose() -> Tensor:
            if modality == "vis":
                return self.selection.numbers(this_pass.visual)
            # Answers are not steered while they are decoded, so they must not be in training either.
            text = this_pass.text & this_pass.prompt & this_pass.visual.any(1, keepdim=True)
            return self.selection.numbers(text, per_row=True)

        everywhere = this_pass.once(("mores", self.selection.spec, modality), choose)
        return this_pass.once(("mores", self.selection.spec, modality, device), lambda: everywhere.to(device))


def _steering(module: nn.Module, kind: str) -> Steering:
    found = module.get_submodule(kind)
    assert isinstance(found, Steering)
    return found


def _unsound(steerings: Mapping[str, Steering], dtype: torch.dtype) -> list[str]:
    """List what does not compute in the layers of one modality: bases, and updates that leave the range of `dtype`.

    Layer after layer steers what the one before has made, so it is random hidden states that go through all of them.
    """
    problems = []
    generator = torch.Generator().manual_seed(0)
    hidden: Tensor | None = None
    for name, steering in steerings.items():
        basis = steering.basis()
        error = float((basis.double() @ basis.double().T - torch.eye(len(basis))).abs().amax())
        if not error <= ORTHONORMAL:
            condition = float(torch.linalg.cond(steering.steer_basis.double()))
            problems.append(
                f"{name}.steer_basis: its {len(basis)} rows span no subspace of as many dimensions (condition number "
                f"{condition:.0e}), so R R^T - I is {error:.0e} where it may be {ORTHONORMAL:.0e}"
            )
            continue
        added = torch.randn(TRIED, basis.shape[1], generator=generator, dtype=torch.float32)
        hidden = added if hidden is None else hidden + added
        hidden = hidden + (nn.functional.linear(hidden, steering.steer_shift, steering.steer_offset) @ basis)
        if not float(hidden.abs().amax()) <= largest_in(dtype):
            named = str(dtype).removeprefix("torch.")
            problems.append(f"{name}.steer_shift or steer_offset: the update of hidden states overflows {named}")
            hidden = None
    return problems


@dataclass(frozen=True)
class MoReS(Mode):
    """Holds the settings of MoReS, and puts one `SteeredLayer` on every chosen decoder layer."""

    name: ClassVar[str] = "mores"
    idle_at_decode: ClassVar[bool] = True

    rank: int = setting(1, "dimension of the steering subspace, 1 to 4 in the paper")
    tokens: str = setting("1%", "which tokens of each image: all, f4+l5, uniform9, 1%")
    modality: str = setting("vis", "which tokens may be steered: vis, text or vis+text (own weights for each)")
    layers: str = setting("all", "which decoder layers: all, 0-15, every:2, 0-7,12")
    dropout: float = setting(0.0, "dropout on the steering update; 0.05 in the paper")

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        found = []
        if self.rank < 1:
            found.append(f"mores_rank is {self.rank}; it must be at least 1")
        elif decoder is not None and self.rank > decoder.hidden_size:
            found.append(f"mores_rank is {self.rank}; it cannot exceed the model's width of {decoder.hidden_size}")
        if self.modality not in MODALITIES:
            found.append(f"mores_modality is {self.modality!r}; choose one of {', '.join(MODALITIES)}")
        if not 0 <= self.dropout < 1:
            found.append(f"mores_dropout is {self.dropout}; it must be at least 0 and below 1")
        try:
            TokenSelection.parse(self.tokens)
        except ValueError as error:
            found.append(f"mores_tokens: {error}")
        try:
            parse_layers(self.layers, None if decoder is None else len(decoder.layers))
        except ValueError as error:
            found.append(f"mores_layers: {error}")
        return found

    def remarks(self, image_tokens: int) -> list[str]:
        selection = TokenSelection.parse(self.tokens)
        count = selection.count(image_tokens)
        if not selection.has_percentage or count >= FEW_TOKENS or "vis" not in MODALITIES[self.modality]:
            return []
        return [
            f"--mores_tokens {self.tokens} steers only {count} of the {image_tokens} tokens of an image. The paper's "
            f"1% are {FEW_TOKENS} of 576: where images have few tokens, a percentage leaves almost none. Give a number "
            f"instead (--mores_tokens uniform{FEW_TOKENS}), or all."
        ]

    def unsound(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
        return [
            problem
            for kind in MODALITIES[self.modality]
            for problem in _unsound(
                {f"{path}.{kind}": _steering(module, kind) for path, module in modules.items()}, dtype
            )
        ]

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        selection = TokenSelection.parse(self.tokens)
        layers = {
            decoder.layers[number].path: {
                kind: Steering(decoder.hidden_size, self.rank, self.dropout) for kind in MODALITIES[self.modality]
            }
            for number in parse_layers(self.layers, len(decoder.layers))
        }
        frames = Frames([steering for steerings in layers.values() for steering in steerings.values()])
        for steering in frames.steerings:
            steering.frames = frames
        return {path: SteeredLayer(selection, steerings) for path, steerings in layers.items()}
