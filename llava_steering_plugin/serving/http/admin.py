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

from llava_steering_plugin.errors import AdapterError, ArgumentsError, SteeringError
from llava_steering_plugin.serving.catalog import AdapterCatalog
from llava_steering_plugin.serving.http.keys import has_key
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import Refused, read_object
from llava_steering_plugin.serving.names import ServedAdapter
from llava_steering_plugin.serving.option_checks import checked_token

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class NameTaken(Exception):
    """There is an adapter of that name already."""


class Admin:
    """Carries out an administrator's requests.

    Args:
        token: requests have to carry it as `Authorization: Bearer TOKEN`.
        changed: called after the catalog has changed.
        folder: adapters may be given by paths below it; None: only by hub ids.
        any_path: adapters may be anywhere.
        start: the folder in which the server was started, for relative paths; None: the current one.

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
        start: Path | None = None,
    ):
        self._token = checked_token(token).encode(errors="surrogateescape")  # the bytes of the environment variable
        self._catalog = catalog
        self._changed = changed
        self._limits = limits
        self._folder = folder
        self._any_path = any_path
        self._start = start or Path.cwd()
        # A thread of its own: loading for minutes would occupy the threads in which requests are checked. One is
        # enough: the catalog changes one adapter at a time.
        self._thread = ThreadPoolExecutor(1, "administering")

    def permits(self, request: Request) -> bool:
        """Return whether a request carries the token."""
        return has_key(request, self._token)

    async def load(self, name: str, path: str, *, replace: bool = True) -> ServedAdapter:
        """Add the adapter at a path or hub id that adapters may come from, or replace the one of that name.

        Raises:
            Refused: they may not come from there (403).
            NameTaken: there is one of that name, and it is not to be replaced.
            SteeringError: it cannot be served.
        """
        return await self._change(lambda: self._put_as_asked(name, path, replace))

    def _put_as_asked(self, name: str, path: str, replace: bool) -> ServedAdapter:
        # In the thread that changes the catalog: another administrator may be loading one of that name.
        if not replace and self.serves(name):
            raise NameTaken
        place = self._allowed(path)
        try:
            return self._catalog.put(name, place)
        except AdapterError as error:
            if self._any_path and not os.path.isabs(place):  # taken for a hub id, because no folder is there
                raise AdapterError(f"{error} No folder of that name is in {' or '.join(self._places())}.") from error
            raise

    async def unload(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            Refused: there is none of that name (404).
        """
        await self._change(lambda: self._drop_if_served(name))

    def _drop_if_served(self, name: str) -> None:
        if not self.serves(name):
            raise Refused(404, "There is no adapter of that name here.")
        self._catalog.drop(name)

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

    async def _change(self, what: Callable[[], T]) -> T:
        done = await asyncio.get_running_loop().run_in_executor(self._thread, what)
        self._changed()
        return done

    def _allowed(self, path: str) -> str:
        """Return the path if adapters may come from there, links followed. A folder takes precedence over a hub id.

        Raises:
            Refused: adapters may not come from there.
            ArgumentsError: there is nothing.
        """
        hub_id = _HUB_ID.fullmatch(path) is not None
        if self._any_path:
            return self._anywhere(path, hub_id)
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

    def _anywhere(self, path: str, hub_id: bool) -> str:
        """Return where a path leads. A relative one means the watched folder first, then that of the start."""
        whole = os.path.expanduser(path)
        if os.path.isabs(whole):
            return whole
        for folder in self._places():
            if os.path.exists(below := os.path.join(folder, whole)):
                return below
        if hub_id:
            return path
        raise ArgumentsError(f"{path} is neither a hub id nor in {' or '.join(self._places())}.")

    def _places(self) -> list[str]:
        """Return the folders in which a relative path is looked for where any folder will do."""
        return [os.path.realpath(folder) for folder in (self._folder, self._start) if folder is not None]
