"""MoReS: low-rank linear steering of visual tokens (LLaVA Steering, arXiv 2412.12359, eq. 3-4).

    h' = h + R^T (W h + b - R h) = h + R^T (M h + b),   M = W - R,   rows of R orthonormal

The update of a hidden state lives in the d-dimensional subspace that R spans. M is learned directly, which saves a
matrix product, and M = b = 0 is the identity to start from. The paper's W is `M + R`. Which tokens are steered is a
setting (`mores_selection.py`), or learned by each layer (`mores_choice.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import (
    DecoderShape,
    ForwardPass,
    Mode,
    largest_in,
    setting,
)
from llava_steering_plugin.modes.mores_choice import TokenChoice, chosen_by_layer, count_choices, listed
from llava_steering_plugin.modes.mores_frames import Frames
from llava_steering_plugin.modes.mores_selection import TokenSelection, parse_choices, parse_layers
from llava_steering_plugin.modes.mores_steering import Pick, Steering

__all__ = ["MoReS", "SteeredLayer", "Steering"]

# How far R R^T may be from I. Measured: 3e-8 at most up to a condition number of 1e4, 1e-6 at 1e5, 1e-2 at 1e7.
ORTHONORMAL = 1e-5
TRIED = 64  # random hidden states that a saved adapter is tried on
# The paper's 1% of 576 tokens. A percentage that comes to fewer is hardly what was meant.
FEW_TOKENS = 6
MODALITIES = {"vis": ("vis",), "text": ("text",), "vis+text": ("vis", "text")}


class SteeredLayer(nn.Module):
    """Steers the selected tokens of a decoder layer's output, with one `Steering` for each modality.

    Samples without an image are not steered, and decode steps change nothing. The modules run on zero rows too, so that
    every parameter has a gradient in every training pass.

    Args:
        selections: which tokens of a modality are steered; of several, the layer learns which, for each modality.
        steerings: by modality, "vis" or "text".

    Shapes:
        output: [rows, positions, D] in any float dtype.
    """

    reads_inputs: ClassVar[bool] = False

    def __init__(self, selections: Sequence[TokenSelection], steerings: Mapping[str, Steering]):
        super().__init__()
        self.selections = tuple(selections)
        for modality, steering in steerings.items():
            self.add_module(modality, steering)
        if len(self.selections) > 1:
            self.choices = nn.ModuleDict({modality: TokenChoice(self.selections) for modality in steerings})

    def forward(self, output: Tensor, inputs: object, this_pass: ForwardPass) -> Tensor:
        if this_pass.decode:
            return output
        hidden = output.flatten(0, 1)
        for modality, steering in self.named_children():
            if not isinstance(steering, Steering):
                continue
            choice = self.choice(modality)
            if choice is None or not choice.learns():
                chosen = self.chosen(this_pass, modality, output.device)
                hidden, picked = Pick.apply(hidden, chosen)  # type: ignore[no-untyped-call]
                update = steering(picked, this_pass)
            else:
                chosen, options = self._options(this_pass, modality, output.device)
                hidden, picked = Pick.apply(hidden, chosen)  # type: ignore[no-untyped-call]
                update = choice(steering(picked, this_pass), options)
            hidden = hidden.index_add(0, chosen, update)
        return hidden.view_as(output)

    def choice(self, modality: str) -> TokenChoice | None:
        """Return what chooses among the selections; None where there is only one."""
        return None if len(self.selections) == 1 else cast(TokenChoice, self.choices[modality])

    def selection(self, modality: str) -> TokenSelection:
        """Return which tokens of a modality are steered."""
        choice = self.choice(modality)
        return self.selections[0] if choice is None else choice.selection()

    def chosen(self, this_pass: ForwardPass, modality: str, device: torch.device) -> Tensor:
        """Return the numbers of the selected positions among the flattened [rows * positions]; int64 [tokens]."""
        selection = self.selection(modality)

        def choose() -> Tensor:
            candidates, per_row = _candidates(this_pass, modality)
            return selection.numbers(candidates, per_row=per_row)

        key = ("mores", selection.spec, modality)
        everywhere = this_pass.once(key, choose)
        return this_pass.once((*key, device), lambda: everywhere.to(device))

    def _options(self, this_pass: ForwardPass, modality: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the numbers of the positions that any selection has, int64 [tokens], and which have them.

        The second is bool [tokens, selections].
        """

        def choose() -> tuple[Tensor, Tensor]:
            candidates, per_row = _candidates(this_pass, modality)
            masks = [each.mask(candidates, per_row=per_row).flatten() for each in self.selections]
            options = torch.stack(masks, 1)
            chosen = options.any(1).nonzero().flatten()
            return chosen, options[chosen]

        key = ("mores options", self.selections, modality)
        everywhere = this_pass.once(key, choose)
        return this_pass.once((*key, device), lambda: (everywhere[0].to(device), everywhere[1].to(device)))


def _candidates(this_pass: ForwardPass, modality: str) -> tuple[Tensor, bool]:
    """Return where a modality has tokens, bool [rows, positions], and whether those of a row count as one run."""
    if modality == "vis":
        return this_pass.visual, False
    # Answers are not steered while they are decoded, so they must not be in training either.
    return this_pass.text & this_pass.prompt & this_pass.visual.any(1, keepdim=True), True


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


def _alike(selections: Sequence[TokenSelection], image_tokens: int) -> list[str]:
    """Say which selections are the same tokens of an image, so that nothing can tell them apart."""
    alike: dict[tuple[bool, ...], list[str]] = {}
    for selection in selections:
        mask = selection.mask(torch.ones(1, image_tokens, dtype=torch.bool))
        alike.setdefault(tuple(mask[0].tolist()), []).append(selection.spec)
    return [
        f"{' and '.join(specs)} of --mores_tokens are the same {sum(tokens)} of the {image_tokens} tokens of an image, "
        "so no layer can tell them apart. Leave out all but one."
        for tokens, specs in alike.items()
        if len(specs) > 1
    ]


@dataclass(frozen=True)
class MoReS(Mode):
    """Holds the settings of MoReS, and puts one `SteeredLayer` on every chosen decoder layer."""

    name: ClassVar[str] = "mores"
    idle_at_decode: ClassVar[bool] = True

    rank: int = setting(1, "dimension of the steering subspace, 1 to 4 in the paper")
    tokens: str = setting(
        "1%", "which tokens of each image: all, f4+l5, uniform9, 1%; of several (1%,5%,all) each layer learns which"
    )
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
            parse_choices(self.tokens)
        except ValueError as error:
            found.append(f"mores_tokens: {error}")
        try:
            parse_layers(self.layers, None if decoder is None else len(decoder.layers))
        except ValueError as error:
            found.append(f"mores_layers: {error}")
        return found

    def remarks(self, image_tokens: int) -> list[str]:
        selections = parse_choices(self.tokens)
        if "vis" not in MODALITIES[self.modality]:
            return []
        if len(selections) > 1:
            return _alike(selections, image_tokens)
        count = selections[0].count(image_tokens)
        if not selections[0].has_percentage or count >= FEW_TOKENS:
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

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        layers = [module for module in modules.values() if isinstance(module, SteeredLayer)]
        choices = {kind: [each.choice(kind) for each in layers] for kind in MODALITIES[self.modality]}
        return count_choices({kind: [each for each in found if each is not None] for kind, found in choices.items()})

    def learned(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        chosen = chosen_by_layer(parameters, parse_choices(self.tokens))
        return {f"chosen tokens, {kind}": listed(by_layer) for kind, by_layer in chosen.items()}

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        selections = parse_choices(self.tokens)
        layers = {
            decoder.layers[number].path: {
                kind: Steering(decoder.hidden_size, self.rank, self.dropout) for kind in MODALITIES[self.modality]
            }
            for number in parse_layers(self.layers, len(decoder.layers))
        }
        frames = Frames([steering for steerings in layers.values() for steering in steerings.values()])
        for steering in frames.steerings:
            steering.frames = frames
        return {path: SteeredLayer(selections, steerings) for path, steerings in layers.items()}
