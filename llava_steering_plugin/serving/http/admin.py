"""Serves /admin/adapters: adds, replaces and removes adapters while the worker runs. Off unless there is a token."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.serving.catalog import AdapterCatalog, ServedAdapter
from llava_steering_plugin.serving.http.keys import has_key
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import Refused, read_object
from llava_steering_plugin.serving.option_checks import checked_token

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class Admin:
    """Carries out an administrator's requests.

    Args:
        token: requests have to carry it as `Authorization: Bearer TOKEN`.
        changed: called after the catalog has changed.
        folder: adapters may be given by paths below it; None: only by hub ids.
        any_path: adapters may be anywhere.

    Raises:
        ArgumentsError: the token is too short.
    """

    def __init__(
        self,
        token: str,
        catalog: AdapterCatalog,
        changed: Callable[[], None],
        limits: Limits,
        *,
        folder: Path | None = None,
        any_path: bool = False,
    ):
        self._token = checked_token(token).encode(errors="surrogateescape")  # the bytes of the environment variable
        self._catalog = catalog
        self._changed = changed
        self._limits = limits
        self._folder = folder
        self._any_path = any_path
        # A thread of its own: loading for minutes would occupy the threads in which requests are checked. One is
        # enough: the catalog changes one adapter at a time.
        self._thread = ThreadPoolExecutor(1, "administering")

    def permits(self, request: Request) -> bool:
        """Return whether a request carries the token."""
        return has_key(request, self._token)

    async def load(self, name: str, path: str) -> ServedAdapter:
        """Add the adapter at a path or hub id that adapters may come from, or replace the one of that name.

        Raises:
            Refused: they may not come from there (403).
            SteeringError: it cannot be served.
        """
        return await self._change(self._catalog.put, name, self._allowed(path))

    async def unload(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            Refused: there is none of that name (404).
        """
        if not self.serves(name):
            raise Refused(404, "There is no adapter of that name here.")
        await self._change(self._catalog.drop, name)

    def serves(self, name: str) -> bool:
        """Return whether there is an adapter of that name."""
        return name in {adapter.name for adapter in self._catalog.adapters()}

    def routes(self) -> list[Route]:
        """Return the routes for the worker's application."""
        return [
            Route("/admin/adapters", self._guarded(self._list), methods=["GET"]),
            Route("/admin/adapters", self._guarded(self._put), methods=["POST"]),
            Route("/admin/adapters/{name}", self._guarded(self._drop), methods=["DELETE"]),
        ]

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                if not self.permits(request):
                    raise Refused(401, "This needs the admin token: Authorization: Bearer TOKEN.")
                return await answer(request)
            except Refused as refused:
                logger.warning("admin request refused with %d", refused.status)
                return refused.response()
            except SteeringError as error:
                return Refused(409, f"{type(error).__name__}: {error}").response()

        return guarded

    async def _list(self, request: Request) -> Response:
        adapters = await asyncio.to_thread(self._catalog.table)
        return JSONResponse({"base": self._catalog.base, "adapters": adapters, "rejected": self._catalog.rejected})

    async def _put(self, request: Request) -> Response:
        data = await read_object(request, self._limits)
        name, path = data.get("name"), data.get("path")
        if not isinstance(name, str) or not isinstance(path, str) or not path or "\0" in path:
            raise Refused(422, 'The request has to be {"name": NAME, "path": FOLDER or HUB/ID}.')
        adapter = await self.load(name, path)
        return JSONResponse({"name": adapter.name, "shown": adapter.shown})

    async def _drop(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.unload(name)
        return JSONResponse({"name": name})

    async def _change(self, what: Callable[..., T], *args: str) -> T:
        done = await asyncio.get_running_loop().run_in_executor(self._thread, what, *args)
        self._changed()
        return done

    def _allowed(self, path: str) -> str:
        """Return the path if adapters may come from there, links followed. A folder takes precedence over a hub id.

        Also with `any_path`, a relative path means the watched folder first.

        Raises:
            Refused: adapters may not come from there.
        """
        if self._any_path:
            below = os.path.join(os.path.realpath(self._folder), path) if self._folder is not None else ""
            return below if os.path.exists(below) else str(Path(path).expanduser())
        hub_id = _HUB_ID.fullmatch(path) is not None
        if self._folder is not None:
            below = os.path.realpath(self._folder)
            wanted = os.path.realpath(os.path.join(below, path))
            inside = wanted != below and Path(wanted).is_relative_to(below)
            if inside and (os.path.exists(wanted) or not hub_id):
                return wanted
        # The current folder may hold a folder of that name, which loading would take instead.
        if hub_id and not os.path.exists(path):
            return path
        where = f"paths below {self._folder} and hub ids" if self._folder is not None else "hub ids"
        raise Refused(
            403, f"Adapters may only come from {where}; start the worker with --admin-any-path to allow others."
        )
