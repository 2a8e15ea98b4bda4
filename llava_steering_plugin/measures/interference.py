"""Measure which tasks help and which disturb each other in the parameters that they share.

Conditional Mixture of LoRA (arXiv 2402.15896), section 2: how much a step for task j changes the loss of task i,

    Delta_j L_i = E_xj [ (g_j / |g_j|)^T grad L_i(x_i) ],    g_j = grad L_j(x_j)

and that change relative to the one by a step for task i itself,

    I_ij = E_xi [ Delta_j L_i(x_i) / Delta_i L_i(x_i) ].

1 on the diagonal; positive: a step for j helps i too; negative: it harms i. The two expectations take different
samples: with the same ones, a task's own step would look better than it is. The mean of ratios is the paper's; it is
heavy-tailed, because the denominator of a sample may be near 0, so the ratio of the means stands beside it.

Two inputs that choose different factors of MixLoRA have products of exactly 0, which says that they do not meet and
nothing of how they would. `shared` leaves such pairs out of the expectations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The name of the group that holds all parameters.
EVERYTHING = "all"
Groups = Mapping[str, Sequence[nn.Parameter]]
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Effects:
    """Holds what a step for each task does to the loss of single samples, over one group of parameters.

    Attributes:
        by_sample: for each task i, float64 [samples of i, tasks]: Delta_j L_i(x_i).
        meeting: for each task i, float64 [samples of i, tasks]: the share of task j's samples that use some row of a
            parameter that x_i uses too.
    """

    by_sample: Sequence[Tensor]
    meeting: Sequence[Tensor]

    def mean_of_ratios(self, *, shared: bool = False) -> Tensor:
        """Return I, float64 [tasks i, tasks j], as the paper defines it; NaN where a task has no effect on itself.

        Samples on which the task's own step has no effect are left out.
        """
        return torch.stack(
            [_ratio(each, each[:, i : i + 1]).nanmean(0) for i, each in enumerate(self._effects(shared))]
        )

    def ratio_of_means(self, *, shared: bool = False) -> Tensor:
        """Return mean effects relative to the task's own mean effect, float64 [tasks i, tasks j]; NaN if it is 0."""
        means = torch.stack([each.nanmean(0) for each in self._effects(shared)])
        return _ratio(means, means.diagonal()[:, None])

    def _effects(self, shared: bool) -> Iterator[Tensor]:
        for effects, meeting in zip(self.by_sample, self.meeting, strict=True):
            yield effects / meeting if shared else effects


def _ratio(effects: Tensor, own: Tensor) -> Tensor:
    """Return effects relative to a task's own, NaN where that is 0: there is nothing to compare with."""
    return torch.where(own == 0, torch.nan, effects / own)


class Interference:
    """Measures the effects of each task's steps on the losses of all, over every group of parameters and over all.

    Memory holds two directions of all parameters for each task, and one sample's gradient.

    Args:
        groups: parameters by the name of their group; no parameter is in two.
        tasks: how many there are; they go by their number.

    Attributes:
        directions: for each task and group, the sum of unit gradients, float32 tensors like the group's parameters.
        used: for each task and group, which rows of the group each sample of the task uses, bool [samples, rows].
    """

    def __init__(self, groups: Groups, tasks: int):
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self.groups: Groups = {**groups, EVERYTHING: self.parameters}
        self.directions = [
            {name: [torch.zeros_like(each, dtype=torch.float32) for each in part] for name, part in self.groups.items()}
            for _ in range(tasks)
        ]
        rows = {name: sum(map(len, part)) for name, part in self.groups.items()}
        self.used = [{name: torch.zeros(0, rows[name], dtype=torch.bool) for name in rows} for _ in range(tasks)]

    def step(self, task: int, loss: Loss) -> None:
        """Take one more sample x_j of a task, whose steps the effects are those of."""
        for name, gradients in self._gradients(loss):
            length = torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().sqrt()
            if length > 0:
                for total, gradient in zip(self.directions[task][name], gradients, strict=True):
                    total += gradient / length
            self.used[task][name] = torch.cat([self.used[task][name], _used_rows(gradients)[None]])

    def effect(self, loss: Loss) -> dict[str, list[tuple[float, float]]]:
        """Return, for each group, a pair for each task j: Delta_j L_i of one sample x_i, and the share that it meets.

        That is the share of j's samples that use some row of a parameter that x_i uses too.
        """
        found = {}
        for name, gradients in self._gradients(loss):
            mine = _used_rows(gradients)
            pairs = []
            for direction, used in zip(self.directions, self.used, strict=True):
                product = sum(
                    float((total * gradient).sum(dtype=torch.float64))
                    for total, gradient in zip(direction[name], gradients, strict=True)
                )
                samples = used[name]
                pairs.append((product / len(samples), float((samples & mine).any(1).double().mean())))
            found[name] = pairs
        return found

    def _gradients(self, loss: Loss) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield the gradient of one sample's loss for each group, float32; zeros where the loss does not reach."""
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), self.parameters, allow_unused=True)
        whole = {
            parameter: torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()
            for parameter, gradient in zip(self.parameters, found, strict=True)
        }
        for name, group in self.groups.items():
            yield name, [whole[parameter] for parameter in group]


def gathered(rows: Iterable[Sequence[Sequence[tuple[float, float]]]]) -> Effects:
    """Return the effects on the samples of all tasks: for each task, the pairs of each sample, over one group."""
    tables = [torch.tensor(samples, dtype=torch.float64) for samples in rows]
    return Effects([table[..., 0] for table in tables], [table[..., 1] for table in tables])


def _used_rows(gradients: Sequence[Tensor]) -> Tensor:
    """Return which rows of the parameters have a gradient, bool [rows of all parameters]."""
    return torch.cat([(gradient != 0).reshape(len(gradient), -1).any(1).cpu() for gradient in gradients])
