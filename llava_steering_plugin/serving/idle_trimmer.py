"""When a worker gives free memory back: soon after the last answer has ended or an adapter has changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from llava_steering_plugin.serving.idle_memory import give_free_pages_back

if TYPE_CHECKING:
    from llava_steering_plugin.serving.catalog import AdapterCatalog

# After which a worker gives free memory back if nothing is going on.
REST_SECONDS = 1.0


class IdleTrimmer:
    """Gives memory back when nothing is going on. For the event loop.

    Args:
        idle: says whether nothing is going on.

    Attributes:
        rested: memory has been given back since something was last going on.
    """

    def __init__(self, idle: Callable[[], bool]):
        self.rested = True
        self._idle = idle
        self._coming: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Something has ended. Whatever is still going on calls this when it ends."""
        self.rested = False
        if self._coming is None:
            self._coming = asyncio.get_running_loop().call_later(REST_SECONDS, self._rest)

    @asynccontextmanager
    async def following(self, catalog: AdapterCatalog) -> AsyncIterator[None]:
        """Inside the block, also after changes of adapters: they leave memory behind, and nobody need ask for them."""
        loop = asyncio.get_running_loop()

        def changed() -> None:  # in whatever thread has changed it
            with suppress(RuntimeError):  # the loop has been closed: the server has stopped
                loop.call_soon_threadsafe(self.soon)

        catalog.followers.append(changed)
        try:
            yield
        finally:
            catalog.followers.remove(changed)

    def _rest(self) -> None:
        self._coming = None
        if self._idle():
            giving_back = asyncio.get_running_loop().run_in_executor(None, give_free_pages_back)
            giving_back.add_done_callback(self._note)

    def _note(self, _: asyncio.Future[None]) -> None:
        self.rested = self._coming is None and self._idle()  # or something has been going on meanwhile
