"""Reads the image files of a request, side by side, for as long as its client waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.images import INVALID, ImageSources, is_fetched
from llava_steering_plugin.serving.http.protocol import left

# Images that are fetched at a time, of all requests and of one: a slow host of one request must not hold up the others.
FETCHING, OF_ONE_REQUEST = 32, 4


class ImageFiles:
    """Reads files for the event loop, in threads.

    Args:
        sources: from where they may come.
    """

    def __init__(self, sources: ImageSources, limits: Limits):
        self._sources = sources
        self._limits = limits
        # Threads of their own: a slow host must not occupy those in which requests are checked.
        self._fetching = ThreadPoolExecutor(FETCHING, "fetching")

    async def read(self, places: Sequence[tuple[str, str]], receive: Receive) -> list[bytes]:
        """Return the files, as they are.

        Args:
            places: the place of each URL in the request, for errors, and the URL.
            receive: of the request, whose body has been read.

        Raises:
            ApiError: some cannot be read, or not in time (400), or they are too large together (413).
            ClientDisconnect: nobody waits for them any more.
        """
        turn = asyncio.Semaphore(OF_ONE_REQUEST)
        reading = [asyncio.ensure_future(self._read(url, place, turn)) for place, url in places]
        together = asyncio.gather(*reading)
        leaving = asyncio.ensure_future(left(receive))
        seconds = self._limits.receive_seconds
        awaited: set[asyncio.Future[Any]] = {together, leaving}
        try:
            await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if together.done():
                files = together.result()
            elif leaving.done():
                raise ClientDisconnect
            else:
                raise ApiError(400, f"The images did not arrive within {seconds:g} seconds.", code=INVALID)
        finally:
            for each in (*reading, leaving):  # those that wait for a thread do not take one any more
                each.cancel()
        if sum(map(len, files)) > self._limits.body_bytes:
            raise ApiError(413, f"The images have more than {self._limits.body_bytes:,} bytes.")
        return files

    async def _read(self, url: str, place: str, turn: asyncio.Semaphore) -> bytes:
        if not is_fetched(url):
            return await asyncio.to_thread(self._sources.read, url, place)
        await turn.acquire()
        file = await asyncio.get_running_loop().run_in_executor(self._fetching, self._sources.read, url, place)
        turn.release()  # not where it fails: the next one would begin before it is cancelled
        return file
