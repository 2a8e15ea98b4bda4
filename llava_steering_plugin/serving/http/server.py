"""Stops the worker: answers on their way may end, then they are ended with a message that their clients can show.

uvicorn alone cancels what is left. Clients then see a connection that breaks off, and the log a traceback for each.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from llava_steering_plugin.serving.generation.slots import Slots

GRACE_SECONDS = 5.0
# For clients to read the end, after which uvicorn cancels.
SENDING_SECONDS = 5


class Server(uvicorn.Server):
    """uvicorn's server, which gives answers on their way some time after SIGTERM or Ctrl-C, and then an end.

    Args:
        config: of uvicorn; its `timeout_graceful_shutdown` is set here.
        slots: where the answers are made.
        grace: seconds in which answers may end by themselves.
    """

    def __init__(self, config: uvicorn.Config, slots: Slots, grace: float = GRACE_SECONDS):
        config.timeout_graceful_shutdown = int(grace) + SENDING_SECONDS
        super().__init__(config)
        self._slots = slots
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and return when all requests are answered."""
        stopping = asyncio.get_running_loop().call_later(self._grace, self._slots.stop)
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()
