"""Which adapters of a pool are on the model's device, and which wait in CPU memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from llava_steering_plugin.hooks.hosts import device_of
from llava_steering_plugin.pool.adapter import PooledAdapter


class Residency:
    """The adapters on the model's device, the least recently used first. Call it under the pool's lock.

    Args:
        host: gives the module of the model that one of an adapter's modules works on, by its path.
        projector: the model's; None if it has none.
        limit: how many adapters may stay on the device; None: all. Those in use stay whatever the limit.
    """

    def __init__(self, host: Callable[[str], nn.Module], projector: nn.Module | None, limit: int | None):
        self._host, self._projector, self.limit = host, projector, limit
        self._order: OrderedDict[PooledAdapter, None] = OrderedDict()

    def add(self, entry: PooledAdapter) -> None:
        """Takes a new adapter to the device if there is room; else it waits for its first use."""
        if self.limit is None or len(self._order) < self.limit:
            self._bring(entry)

    def enter(self, entries: Iterable[PooledAdapter]) -> None:
        """A call begins to use the adapters: they come to the device, and stay there until it ends."""
        used = list(entries)
        for entry in used:
            entry.users += 1
        try:
            self._make_room(sum(not entry.resident for entry in used))
            for entry in used:
                if not entry.resident:
                    self._bring(entry)
                self._order.move_to_end(entry)
        except BaseException:
            for entry in used:
                entry.users -= 1
            raise

    def leave(self, entries: Iterable[PooledAdapter]) -> None:
        """The call has ended."""
        for entry in entries:
            entry.users -= 1
        self._make_room()

    def forget(self, entry: PooledAdapter) -> None:
        """The adapter has left the pool. Its memory is freed when nobody uses it any more."""
        self._order.pop(entry, None)

    def _bring(self, entry: PooledAdapter) -> None:
        for path, module in entry.modules.items():
            _move(module, device_of(self._host(path)))
        if entry.projector is not None and self._projector is not None:
            _move(entry.projector, device_of(self._projector))
        entry.resident = True
        self._order[entry] = None

    def _make_room(self, coming: int = 0) -> None:
        excess = 0 if self.limit is None else len(self._order) + coming - self.limit
        if excess <= 0:
            return
        for entry in [entry for entry in self._order if not entry.users][:excess]:
            for module in (*entry.modules.values(), entry.projector):
                if module is not None:
                    _move(module, torch.device("cpu"))
            entry.resident = False
            del self._order[entry]


def _move(module: nn.Module, device: torch.device | None) -> None:
    if device is not None:
        module.to(device)
