"""Joint modes: two modes at once, such as steering of hidden states and factors in the linears (arXiv 2603.00425).

`a+b` is made of any two modes whose modules sit on different hosts. Each part computes as it does alone. The settings
of a joint mode are those of its parts under the names of their flags, such as `mores_rank`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.modes.base import UNBUILDABLE, DecoderShape, Mode, StepStatistics

JOIN = "+"
# The attribute of a module that names the part which has built it.
PART = "joint_part"


class Joint(Mode):
    """Parent of all joint modes; `joint_kind` makes them.

    Attributes:
        kinds: the classes of the parts, in the order of the name.
    """

    kinds: ClassVar[tuple[type[Mode], ...]]

    @functools.cached_property
    def parts(self) -> tuple[Mode, ...]:
        """Return the parts with their settings."""
        return tuple(
            kind(**{each.name: getattr(self, f"{kind.name}_{each.name}") for each in dataclasses.fields(kind)})
            for kind in self.kinds
        )

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        found = [problem for part in self.parts for problem in part.problems(decoder)]
        return found if found or decoder is None else self._shared_hosts(decoder)

    def _shared_hosts(self, decoder: DecoderShape) -> list[str]:
        """Return a problem if several parts want the same host: which of them came first would change the answers."""
        try:
            with torch.device("meta"):
                built = [part.build(decoder) for part in self.parts]
        except UNBUILDABLE:
            return []  # settings that describe nothing: whoever builds the modules says so, with the error
        return [f"the tuning mode {self.name}: {problem}" for problem in _shared(self.parts, built)]

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        built = [part.build(decoder) for part in self.parts]
        if problems := _shared(self.parts, built):
            raise ArgumentsError(listing(f"the tuning mode {self.name} does not fit this model", problems))
        for part, modules in zip(self.parts, built, strict=True):
            for module in modules.values():
                setattr(module, PART, part.name)
        return {path: module for modules in built for path, module in modules.items()}

    def begin(self, modules: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> None:
        for part, mine in self.divided(modules):
            part.begin(mine, {path: hosts[path] for path in mine})

    def config_for_peft(self, decoder: DecoderShape) -> None:
        """Return None: PEFT would load one part alone, which answers otherwise than both."""

    @property
    def shards(self) -> bool:
        return all(part.shards for part in self.parts)

    @property
    def full_name(self) -> str:
        return JOIN.join(part.full_name for part in self.parts)

    def remarks(self, image_tokens: int) -> list[str]:
        return [remark for part in self.parts for remark in part.remarks(image_tokens)]

    def unsound(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
        return [problem for part, mine in self.divided(modules) for problem in part.unsound(mine, dtype)]

    def statistics(self, modules: Mapping[str, nn.Module]) -> StepStatistics | None:
        found = {part.name: part.statistics(mine) for part, mine in self.divided(modules)}
        gathered = {name: statistics for name, statistics in found.items() if statistics is not None}
        return JointStatistics(gathered) if gathered else None

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for part, mine in self.divided(modules):
            for name, value in part.report(mine).items():
                figures[f"{part.name}_{name}" if name in figures else name] = value
        return figures

    def learned(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: chosen for part in self.parts for name, chosen in part.learned(parameters).items()}

    def settings(self) -> dict[str, Any]:
        return flags_of(self)

    def divided(self, modules: Mapping[str, nn.Module]) -> list[tuple[Mode, dict[str, nn.Module]]]:
        """Return each part with those of the modules that it has built."""
        return [
            (part, {path: module for path, module in modules.items() if part_of(module) == part.name})
            for part in self.parts
        ]


class JointStatistics(StepStatistics):
    """Leads the statistics of several parts through a training.

    Args:
        parts: their statistics, by the names of the parts.
    """

    def __init__(self, parts: Mapping[str, StepStatistics]):
        self.parts = dict(parts)

    def begin(self, passes: int) -> None:
        for statistics in self.parts.values():
            statistics.begin(passes)

    def end_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        for statistics in self.parts.values():
            statistics.end_step(add_up)

    def state(self) -> dict[str, Any]:
        return {name: statistics.state() for name, statistics in self.parts.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        # A part of which the checkpoint says nothing had no statistics in the version that wrote it: it goes on so.
        for name in self.parts.keys() - state.keys():
            self.parts.pop(name).begin(1)
        for name, statistics in self.parts.items():
            statistics.load(state[name])


def joint(*modes: Mode) -> Mode:
    """Return the mode that is several at once.

    Args:
        modes: two modes with their settings, in any order. One alone is returned as it is.

    Raises:
        ArgumentsError: they cannot be joined.
    """
    if len(modes) == 1:
        return modes[0]
    kind = joint_kind(type(mode) for mode in modes)
    values = {
        f"{mode.name}_{each.name}": getattr(mode, each.name) for mode in modes for each in dataclasses.fields(mode)
    }
    return kind(**values)


def joint_kind(kinds: Iterable[type[Mode]]) -> type[Joint]:
    """Return the class of the joint mode of two modes, whichever comes first.

    Its name has the part first that is idle at decode steps, as steering is, and else follows the alphabet: so one
    adapter has one name.

    Raises:
        ArgumentsError: there are more or fewer than two, one is twice there, or one trains the projector alone.
    """
    given = [part for kind in kinds for part in kinds_of(kind)]
    ordered = sorted(given, key=lambda kind: (not kind.idle_at_decode, kind.name))
    names = [kind.name for kind in ordered]
    if len(names) != 2:
        raise ArgumentsError(f"a joint mode has two parts, and {JOIN.join(names) or 'nothing'} has {len(names)}")
    if alone := [kind.name for kind in ordered if kind.projector_alone]:
        others = " and ".join(name for name in names if name not in alone) or "every mode"
        raise ArgumentsError(
            f"{JOIN.join(names)} is nothing new: {others} trains the projector too, unless --freeze_mm_mlp_adapter is "
            "True"
        )
    if names[0] == names[1]:
        raise ArgumentsError(f"a joint mode has two different parts, and {JOIN.join(names)} is {names[0]} twice")
    return _made(*ordered)


@functools.cache
def _made(*kinds: type[Mode]) -> type[Joint]:
    fields: list[tuple[str, Any, Any]] = []
    for kind in kinds:
        types = get_type_hints(kind)
        for each in dataclasses.fields(kind):
            copied = dataclasses.field(
                default=each.default, default_factory=each.default_factory, metadata=each.metadata
            )
            fields.append((f"{kind.name}_{each.name}", types[each.name], copied))
    names = [name for name, _, _ in fields]
    joined = JOIN.join(kind.name for kind in kinds)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentsError(f"the parts of {joined} have settings of the same name: {', '.join(twice)}")
    if hidden := [name for name in names if hasattr(Joint, name)]:
        raise ArgumentsError(
            f"{joined} cannot be: modes use the names of these settings themselves: {', '.join(hidden)}"
        )
    namespace = {
        "name": joined,
        "kinds": kinds,
        "idle_at_decode": all(kind.idle_at_decode for kind in kinds),
        "__module__": __name__,
    }
    return dataclasses.make_dataclass(
        "".join(kind.__name__ for kind in kinds), fields, bases=(Joint,), namespace=namespace, frozen=True
    )


def parts_of(mode: Mode) -> tuple[Mode, ...]:
    """Return the parts of a joint mode; of any other the mode itself."""
    return mode.parts if isinstance(mode, Joint) else (mode,)


def kinds_of(kind: type[Mode]) -> tuple[type[Mode], ...]:
    """Return the classes of the parts of a joint mode; of any other the class itself."""
    return kind.kinds if issubclass(kind, Joint) else (kind,)


def part_names(name: str) -> list[str]:
    """Return the names of the parts of a mode, from its own name alone."""
    return name.split(JOIN)


def part_of(module: nn.Module) -> str | None:
    """Return the name of the part that has built a module of a joint mode; None for one of any other mode."""
    return getattr(module, PART, None)


def flags_of(mode: Mode) -> dict[str, Any]:
    """Return the settings of a mode by the names of their flags, `<mode>_<setting>`; of a joint one, of its parts."""
    return {f"{part.name}_{name}": value for part in parts_of(mode) for name, value in part.settings().items()}


def at_decode(mode: Mode, modules: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Return those of a mode's modules that are called at decode steps: not those of parts that are idle there."""
    if isinstance(mode, Joint):
        return {
            path: module
            for part, mine in mode.divided(modules)
            for path, module in mine.items()
            if not part.idle_at_decode
        }
    return {} if mode.idle_at_decode else modules


def reads_padding(mode: Mode) -> bool:
    """Say whether padding in a batch changes the rows of a mode, which says so with a true `reads_padding`."""
    return any(getattr(part, "reads_padding", False) for part in parts_of(mode))


def _shared(parts: Iterable[Mode], built: Iterable[Mapping[str, nn.Module]]) -> list[str]:
    """Return the hosts that several parts want, one sentence each."""
    wanted: dict[str, list[str]] = {}
    for part, modules in zip(parts, built, strict=True):
        for path in modules:
            wanted.setdefault(path, []).append(part.name)
    return shortened(
        [
            f"{' and '.join(names)} both change the output of {path}, and only one can; give them other layers or "
            "linears, or train one alone"
            for path, names in wanted.items()
            if len(names) > 1
        ]
    )
