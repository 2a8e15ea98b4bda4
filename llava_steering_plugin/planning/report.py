"""Report the memory of a training under every kind of sharding, and whether it fits a GPU: as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from llava_steering_plugin.planning.gpus import GIB, Gpu
from llava_steering_plugin.planning.sharding import Memory


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a training.

    Attributes:
        assumed: what it depends on beside the model: batch, sequence, dtype, ...
        shardings: bytes on each GPU by the name of the sharding.
        chosen: the name of the sharding that the flags ask for.
        gpu: the GPU that the training shall run on; None if none was named.
        notes: what is assumed or not counted.
    """

    assumed: Mapping[str, Any]
    shardings: Mapping[str, Memory]
    chosen: str
    gpu: Gpu | None = None
    notes: tuple[str, ...] = ()

    def fits(self, name: str) -> bool | None:
        """Return whether the training fits the GPU under that sharding; None if no GPU was named."""
        return None if self.gpu is None else self.gpu.holds(self.shardings[name].total)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the notes as plain values."""
        return {
            "assumed": dict(self.assumed),
            "gpu": None if self.gpu is None else {"name": self.gpu.name, "bytes": self.gpu.size},
            "chosen": self.chosen,
            "per_gpu": {name: {**memory.as_json(), "fits": self.fits(name)} for name, memory in self.shardings.items()},
        }


def memory_table(report: MemoryReport) -> Table:
    """Return a table of GiB on each GPU, with a column for each sharding, those of the flags first."""
    names = [report.chosen, *(name for name in report.shardings if name != report.chosen)]
    assumed = ", ".join(f"{key} {value}" for key, value in report.assumed.items())
    table = Table(title=f"Memory of each GPU in GiB ({assumed})", title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in names:
        table.add_column(name + (" (these flags)" if name == report.chosen else ""), justify="right")
    columns = [report.shardings[name] for name in names]
    for part in columns[0].weights:
        table.add_row(f"weights: {part}", *(_gib(column.weights[part]) for column in columns))
    for part in ("gradients", "optimizer", "buffers", "activations"):
        table.add_row(part, *(_gib(getattr(column, part)) for column in columns))
    table.add_row("total", *(_gib(column.total) for column in columns), style="bold")
    if any(column.host for column in columns):
        table.add_row("in the host's memory", *(_gib(column.host) for column in columns))
    if report.gpu is not None:
        table.add_row(
            f"fits {report.gpu.name} ({report.gpu.size / GIB:.0f} GiB)",
            *(
                f"{'yes' if report.fits(name) else 'NO'}, {report.shardings[name].total / report.gpu.size:.0%}"
                for name in names
            ),
        )
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
