"""Moves the adapters of a pool between the model's device and CPU memory."""

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

    def add(self, adapter: PooledAdapter) -> None:
        """Bring a new adapter to the device if there is room; else it waits for its first use."""
        if self.limit is None or len(self._order) < self.limit:
            self._bring(adapter)

    def enter(self, adapters: Iterable[PooledAdapter]) -> None:
        """Count a call that begins to use the adapters: they come to the device and stay there until it ends."""
        used = list(adapters)
        for adapter in used:
            adapter.users += 1
        try:
            self._make_room(sum(not adapter.resident for adapter in used))
            for adapter in used:
                if not adapter.resident:
                    self._bring(adapter)
                self._order.move_to_end(adapter)
        except BaseException:
            for adapter in used:
                adapter.users -= 1
            raise

    def leave(self, adapters: Iterable[PooledAdapter]) -> None:
        """Count a call that has ended."""
        for adapter in adapters:
            adapter.users -= 1
        self._make_room()

    def forget(self, adapter: PooledAdapter) -> None:
        """Drop an adapter that has left the pool. Its memory is freed when no call uses it any more."""
        self._order.pop(adapter, None)

    def _bring(self, adapter: PooledAdapter) -> None:
        for path, module in adapter.modules.items():
            _move(module, device_of(self._host(path)))
        if adapter.projector is not None and self._projector is not None:
            _move(adapter.projector, device_of(self._projector))
        adapter.resident = True
        self._order[adapter] = None

    def _make_room(self, coming: int = 0) -> None:
        excess = 0 if self.limit is None else len(self._order) + coming - self.limit
        if excess <= 0:
            return
        for adapter in [adapter for adapter in self._order if not adapter.users][:excess]:
            for module in (*adapter.modules.values(), adapter.projector):
                if module is not None:
                    _move(module, torch.device("cpu"))
            adapter.resident = False
            del self._order[adapter]


def _move(module: nn.Module, device: torch.device | None) -> None:
    if device is not None:
        module.to(device)
