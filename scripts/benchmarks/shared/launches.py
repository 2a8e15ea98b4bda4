"""Count what a GPU launches: operations that are no views and compute something. Exact, on any device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Memory that nothing is written to yet, and a view that its schema calls none.
_NOTHING_LAUNCHED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name while it is entered, those of backward passes too.

    Not counted are views, which compute nothing, and allocations. An operation counts once, however many kernels a
    device takes for it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Return the number of all operations."""
        return self.found.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not is_view(func) and name not in _NOTHING_LAUNCHED:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def is_view(operation: torch._ops.OpOverload) -> bool:
    """Say whether an operation returns a view of its arguments, and writes into none of them."""
    aliases = [returned.alias_info for returned in operation._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
