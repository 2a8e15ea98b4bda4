"""Keeps web pages of other sites out: a request needs a Host of this server; an Origin, if any, has to be one, too.

That a server listens on localhost does not keep pages out that a browser on this machine shows. They may send it
requests, without asking first if these are text/plain, and the browser then names their site in `Origin`. A site can
also have its own name lead to this machine; that name stands in `Host`.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.serving.http.openai.errors import refusal_at
from llava_steering_plugin.serving.proxies import host_of, is_loopback

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
EVERYWHERE = ("0.0.0.0", "::")  # listening addresses that are nobody's name
FORBIDDEN = (
    "This request comes from another site, or calls this server by a name that it does not know. If it is yours, start "
    "the server with --allowed-host and the name or address by which it is called."
)


def plain(host: str) -> str:
    """Return a host as it is compared: in lower case, without brackets and a dot at its end."""
    return host.strip("[]").rstrip(".").lower()


def checked_host(name: str, flag: str = "--allowed-host") -> str:
    """Return the host that a flag gives, as it stands in requests.

    Raises:
        ArgumentsError: it is more than a host's name or address, or none.
    """
    host = plain(name)
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    with suppress(UnicodeError):
        host = host.encode("idna").decode()  # as browsers send letters beyond ASCII
        if _NAME.fullmatch(host):
            return host
    raise ArgumentsError(
        f"{flag} {name}: give a host's name or address alone, as it is in the browser's address bar between "
        "http:// and the port or the next slash."
    )


def checked_hosts(names: Iterable[str], flag: str = "--allowed-host") -> list[str]:
    """Return all hosts that a flag gives, as `checked_host` does.

    Raises:
        ArgumentsError: some are none; the message names them all.
    """
    problems, hosts = Problems(), []
    for name in names:
        with problems.noted():
            hosts.append(checked_host(name, flag))
    problems.raise_any("some names of this server cannot be used")
    return hosts


class HostCheck:
    """Refuses requests with a foreign Host or Origin with 403, in front of an ASGI application.

    Args:
        allowed: names and addresses of the server besides those of the loopback interface.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()):
        self.app = app
        self.allowed = frozenset(map(plain, allowed)) - {"", *EVERYWHERE}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._passes(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            logger.info("refused with 403: a foreign Host or Origin")
            await refusal_at(scope["path"], 403, FORBIDDEN)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: a 403

    def _passes(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        hosts: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in headers:
            if name in hosts:
                text = value.decode("latin-1")
                hosts[name].append(host_of(text if name == b"origin" else f"//{text}"))
        return bool(hosts[b"host"]) and all(map(self._known, (*hosts[b"host"], *hosts[b"origin"])))

    def _known(self, host: str) -> bool:
        return is_loopback(host) or plain(host) in self.allowed
