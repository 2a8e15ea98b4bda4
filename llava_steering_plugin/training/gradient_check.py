"""Check in the first steps of a training that every parameter of the adapter receives a gradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.fit.base_model import projector_of
from llava_steering_plugin.adapters.parameters import parameters_of
from llava_steering_plugin.errors import SteeringError, listing

logger = logging.getLogger(__name__)

# How many steps with tokens a parameter may go without a gradient. The inner factors of a new adapter have none in the
# first one, because the outer ones are zero, and the warm-up of the learning rate makes the first steps small.
STEPS = 10
# After so many steps without a token for some module, the user hears of it.
LONG = 50
_NAMED = 10


class GradientCheck(TrainerCallback):
    """Stop a training if no gradient reaches a parameter in its first step, or only zeros in `STEPS` steps that count.

    A step counts for a parameter if some rank called the module that holds it on a tensor with elements in it: a batch
    without images has no token for a module that works on image tokens. Where that module is never called, its parent
    decides. Steps that a loss scaler has skipped do not count.

    A resumed training is not judged again. Ranks exchange what they saw in the first step, in every tenth one and at
    the end, and decide alike.

    Zeros are expected in the last decoder layer: the hidden state of a visual token reaches no other token from there,
    and visual tokens have no targets of their own.

    Args:
        parameters: the trained ones of the adapter, by name.
        modules: of the adapter, which hold them.
        may_be_zero: a path; parameters below it may have gradients of zeros. It is that of the last layer.
    """

    # Hooks rather than `.grad`, which DeepSpeed keeps elsewhere. Each is removed once it has seen enough.

    def __init__(self, parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module], may_be_zero: str):
        self.names = list(parameters)
        self.steps, self.warned = 0, False
        self._chains = _chains(parameters, modules)
        self._called: dict[int, bool] = {}  # modules by id: called in this step, and on a tensor with elements
        device = next(iter(parameters.values())).device
        # By parameter. [0]: a gradient arrived; [1]: it had an element that was neither zero nor overflown. It is read
        # seldom: other steps do not wait for it.
        self._seen = torch.zeros(2, len(self.names), device=device)
        self._counting = torch.zeros(STEPS, len(self.names))  # whether the steps since the last exchange count
        self._counted = torch.zeros(len(self.names))
        self._passes = torch.tensor([name.startswith(f"{may_be_zero}.") for name in self.names])
        self._gradients = {at: each.register_hook(self._hook(at)) for at, each in enumerate(parameters.values())}
        parts = {id(part): part for chain in self._chains for part in chain}
        self._calls = [part.register_forward_hook(self._note_call) for part in parts.values()]

    @classmethod
    def of(cls, attachment: Attachment) -> GradientCheck:
        """Return the check of an adapter on its model; of the projector, where that alone is trained.

        A projector may get zeros for long: LLaVA sends a blank picture through it for a text.
        """
        if attachment.modules or (found := projector_of(attachment.model)) is None:
            return cls(attachment.trained(), attachment.modules, attachment.shape.layers[-1].path)
        path, projector = found
        trained = parameters_of({path: projector})
        return cls({name: each for name, each in trained.items() if each.requires_grad}, {path: projector}, path)

    @property
    def handles(self) -> list[RemovableHandle]:
        """Return the hooks that are left; none once the check is done."""
        return [*self._gradients.values(), *self._calls]

    def _hook(self, at: int) -> Any:
        def note(gradient: Tensor) -> None:
            if self._seen.device != gradient.device:
                self._seen = self._seen.to(gradient.device)
            self._seen[0, at] = 1
            some = ((gradient != 0) & gradient.isfinite()).any()
            self._seen[1, at] = torch.maximum(self._seen[1, at], some.float())

        return note

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Without gradients it is no training, or a first pass that checkpointing repeats.
        if module.training and torch.is_grad_enabled():
            given = next((each for each in args if isinstance(each, Tensor)), None)
            some = given is None or given.numel() > 0
            self._called[id(module)] = self._called.get(id(module), False) or some

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self._end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._calls:
            return
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self._counting[self.steps % STEPS] = torch.tensor(
                [self._has_tokens(chain) for chain in self._chains]
            ).float()
        self._called.clear()
        self.steps += 1
        if self.steps == 1 or self.steps % STEPS == 0:
            self._judge(*self._exchange(args.device))
        if self.steps >= LONG:
            self._warn(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._calls and self.steps:
            self._exchange(args.device)
            self._warn(args)
        self._end()

    def _has_tokens(self, chain: list[nn.Module]) -> bool:
        return next((self._called[id(part)] for part in chain if id(part) in self._called), False)

    def _exchange(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return of every parameter whether a gradient arrived on some rank, and whether one was no zero."""
        # Offloaded parameters are on the CPU, and ranks cannot exchange what is there.
        noted = torch.cat([self._seen.to(device), self._counting.to(device)])
        # A rank may have had no images so far; one rank that had some is enough.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX)
        noted = noted.cpu()
        self._counted += noted[2:].sum(0)
        self._counting.zero_()
        return noted[0].bool(), noted[1].bool()

    def _judge(self, arrived: Tensor, nonzero: Tensor) -> None:
        self._passes |= nonzero
        failed = ~self._passes & (self._counted >= STEPS)
        problems = [f"{self.names[at]}: no gradient arrived" for at in _where(~arrived)]
        problems += [f"{self.names[at]}: all gradients were zero or not finite" for at in _where(failed & arrived)]
        if problems:
            raise SteeringError(
                listing(
                    f"after {self.steps} step(s), {len(problems)} of the adapter's {len(self.names)} parameters cannot "
                    "learn. Likely reasons: everything is masked out of the loss, or gradient checkpointing runs on "
                    "inputs that need no gradient",
                    _first(problems),
                )
            )
        if self.steps < STEPS:
            return
        for at in _where(self._passes):
            if at in self._gradients:
                self._gradients.pop(at).remove()
        if bool((self._passes & (self._counted > 0)).all()):
            self._end()

    def _warn(self, args: Any) -> None:
        """Say once which parameters no token was there for; the last exchange tells."""
        idle = [self.names[at] for at in _where(self._counted == 0)]
        if self.warned or not idle:
            return
        self.warned = True
        if args.process_index == 0:
            logger.warning(
                listing(
                    f"no image in {self.steps} step(s), or no token of one that is selected: {len(idle)} of the "
                    f"adapter's {len(self.names)} parameters have not been trained on anything. Check that the data "
                    "has images, and which tokens the flags of the mode select",
                    _first(idle),
                )
            )

    def _end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self._gradients, self._calls = {}, []


def _chains(parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]) -> list[list[nn.Module]]:
    """Return for each parameter the module that holds it, its parent, and so on up to the one on the host."""
    found = {}
    for module in modules.values():
        parts = dict(module.named_modules())
        for name, parameter in module.named_parameters():
            above = name.split(".")[:-1]
            found[id(parameter)] = [parts[".".join(above[:depth])] for depth in range(len(above), -1, -1)]
    return [found[id(parameter)] for parameter in parameters.values()]


def _where(mask: Tensor) -> list[int]:
    return [int(at) for at in mask.nonzero().flatten()]


def _first(names: list[str]) -> list[str]:
    return names[:_NAMED] + ([f"... and {len(names) - _NAMED} more"] if len(names) > _NAMED else [])
