"""Does it fit? The memory of a training under every kind of sharding, beside that of a GPU; as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from llava_steering_plugin.planning.gpus import GIB, Gpu
from llava_steering_plugin.planning.sharding import Memory


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training.

    Attributes:
        assumed: what it depends on beside the model: batch, sequence, dtype, ...
        shardings: bytes on each GPU by the name of the sharding.
        chosen: the one that the flags ask for.
        gpu: that it shall run on; None if none was named.
    """

    assumed: Mapping[str, Any]
    shardings: Mapping[str, Memory]
    chosen: str
    gpu: Gpu | None = None

    def fits(self, name: str) -> bool | None:
        """Whether that sharding fits the GPU; None without one."""
        return None if self.gpu is None else self.gpu.holds(self.shardings[name].total)

    def as_json(self) -> dict[str, Any]:
        return {
            "assumed": dict(self.assumed),
            "gpu": None if self.gpu is None else {"name": self.gpu.name, "bytes": self.gpu.size},
            "chosen": self.chosen,
            "per_gpu": {name: {**memory.as_json(), "fits": self.fits(name)} for name, memory in self.shardings.items()},
        }


def memory_table(plan: MemoryPlan) -> Table:
    """GiB on each GPU, a column for each sharding; the one that the flags ask for comes first."""
    names = [plan.chosen, *(name for name in plan.shardings if name != plan.chosen)]
    assumed = ", ".join(f"{key} {value}" for key, value in plan.assumed.items())
    table = Table(title=f"Memory of each GPU in GiB ({assumed})", title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in names:
        table.add_column(name + (" (these flags)" if name == plan.chosen else ""), justify="right")
    columns = [plan.shardings[name] for name in names]
    for part in columns[0].weights:
        table.add_row(f"weights: {part}", *(_gib(column.weights[part]) for column in columns))
    for part in ("gradients", "optimizer", "buffers", "activations"):
        table.add_row(part, *(_gib(getattr(column, part)) for column in columns))
    table.add_row("total", *(_gib(column.total) for column in columns), style="bold")
    if any(column.host for column in columns):
        table.add_row("in the host's memory", *(_gib(column.host) for column in columns))
    if plan.gpu is not None:
        table.add_row(
            f"fits {plan.gpu.name} ({plan.gpu.size / GIB:.0f} GiB)",
            *(
                f"{'yes' if plan.fits(name) else 'NO'}, {plan.shardings[name].total / plan.gpu.size:.0%}"
                for name in names
            ),
        )
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
