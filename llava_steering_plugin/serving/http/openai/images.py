"""Reads the images that a request names: in the request itself, and from hosts and a folder if flags allow it.

A request must not make the server read its own files, or ask machines that only it can reach. So a file lies in the one
folder, links followed; a URL is https and its host is in the list; the addresses of the host are looked up here, have
to be public all of them, and the connection goes to one of these; where a host sends the request on, all that is
checked again.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.foreign_files import read_bytes
from llava_steering_plugin.serving.http.access import checked_hosts, plain
from llava_steering_plugin.serving.http.openai.errors import ApiError

logger = logging.getLogger(__name__)

REDIRECTS = 3
PIECE = 1 << 16
INVALID = "invalid_image_url"
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


# What Python's `is_global` takes for the internet, depending on its version: protocols' own, and documentation's.
_NOT_PUBLIC = [ipaddress.ip_network(network) for network in ("192.0.0.0/24", "3fff::/20")]
_UNICAST, _NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet's, and not of this machine or its networks."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found not in _UNICAST:  # site-local ones, and other ways to write IPv4's
            return False
    return found.is_global and not found.is_multicast and not any(found in network for network in _NOT_PUBLIC)


def is_fetched(url: str) -> bool:
    """Return whether a URL names an image on another machine, which may be slow."""
    return url[:6].lower() == "https:"


class ImageSources:
    """Reads images from where they may come.

    Args:
        hosts: whose https URLs are fetched, without a proxy; none by default.
        folder: in which files may lie; None: no file is read.
        most: bytes of an image.
        seconds: in which all of an image has to arrive.
        public: says whether an IP address may be asked.
        port: of the URLs.
    """

    def __init__(
        self,
        hosts: Iterable[str] = (),
        folder: Path | None = None,
        *,
        most: int = 16 << 20,
        seconds: float = 10.0,
        public: Callable[[str], bool] = is_public,
        port: int = 443,
    ):
        self._hosts = frozenset(checked_hosts(hosts, "--allowed-media-domains"))
        self._folder = folder
        self._most = most
        self._seconds = seconds
        self._public = public
        self._port = port

    def read(self, url: str, place: str) -> bytes:
        """Return the file of an image. It may take `seconds`, and more where the system looks names up slowly.

        Args:
            url: a `data:`, `https:` or `file:` URL.
            place: of the URL in the request, for errors.

        Raises:
            ApiError: it may not be read, or cannot be (400).
        """
        if found := _DATA.match(url):
            try:
                return base64.b64decode(url[found.end() :], validate=True)
            except ValueError as error:
                raise ApiError(400, f"{place} is not valid base64.", param=place, code=INVALID) from error
        try:
            parts = urlsplit(url)
            kind = parts.scheme.lower()
            if kind == "https":
                return self._fetched(url)
            if kind == "file":
                return self._file(parts)
        except ApiError as error:
            raise ApiError(error.status, f"{place}: {error.text}", param=place, code=error.code) from error.__cause__
        except ValueError as error:
            raise ApiError(400, f"{place} is no URL.", param=place, code=INVALID) from error
        kinds = ["data:image/...;base64,"] + ["https:"] * bool(self._hosts) + ["file:"] * (self._folder is not None)
        raise ApiError(400, f"{place} has to begin with {' or '.join(kinds)}.", param=place, code=INVALID)

    def _file(self, parts: SplitResult) -> bytes:
        if self._folder is None:
            raise _refused("files are not read here; the server's --allowed-local-media-path allows a folder.")
        below = os.path.realpath(self._folder)
        try:
            wanted = os.path.realpath(unquote(parts.path))
            if parts.netloc.lower() in ("", "localhost") and Path(wanted).is_relative_to(below):
                return read_bytes(wanted, self._most)
        except (OSError, ValueError):  # a name with a zero byte, too
            pass  # not told apart from what lies outside: nobody learns which files there are
        raise _refused("there is no such file in the folder that this server allows, or it is too large.")

    def _fetched(self, url: str) -> bytes:
        end = time.monotonic() + self._seconds
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(url)
            host = plain(parts.hostname or "")
            if parts.scheme.lower() != "https" or host not in self._hosts or (parts.port or 443) != self._port:
                raise _refused(
                    "no image is fetched from there; the server's --allowed-media-domains lists hosts, and only https "
                    "is spoken."
                )
            try:
                content, onward = self._asked(parts, host, end)
            except (OSError, http.client.HTTPException, SteeringError) as error:
                if time.monotonic() >= end:
                    raise _refused(f"the image did not arrive within {self._seconds:g} seconds.") from error
                logger.info("an image of %s cannot be fetched: %s: %s", host, type(error).__name__, error)
                raise _refused("the image cannot be fetched from there.") from error
            if onward is None:
                return content
            url = urljoin(url, onward)
        raise _refused(f"the image lies behind more than {REDIRECTS} redirects.")

    def _asked(self, parts: SplitResult, host: str, end: float) -> tuple[bytes, str | None]:
        """Return what a host sends; or nothing, and where it sends the request on."""
        connection = _Connection(host, self._port, self._addresses(host), end)
        watch = threading.Timer(max(end - time.monotonic(), 0), connection.cut)
        watch.daemon = True
        watch.start()
        try:
            target = parts.path or "/"
            target += f"?{parts.query}" if parts.query else ""
            connection.request("GET", target, headers={"Accept": "image/*"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return b"", response.headers.get("Location") or ""
            if response.status != 200:
                raise _refused(f"that host answers with status {response.status}.")
            content = bytearray()
            while piece := response.read1(PIECE):
                content += piece
                if time.monotonic() >= end:
                    raise TimeoutError
                if len(content) > self._most:
                    raise _refused(f"the image has more than {self._most:,} bytes.")
            if time.monotonic() >= end:  # it was cut
                raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(bytes(content))
            return bytes(content), None
        finally:
            watch.cancel()
            connection.close()

    def _addresses(self, host: str) -> list[str]:
        """Look up a host, whose addresses have to be public all of them.

        Raises:
            ApiError: some are not.
            OSError: it has none.
        """
        found = socket.getaddrinfo(host, self._port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if not all(map(self._public, addresses)):
            raise _refused("that host is in a private network.")
        return addresses


class _Connection(http.client.HTTPSConnection):
    """Connects to one of the addresses that were checked, by its host's name."""

    def __init__(self, host: str, port: int, addresses: list[str], end: float):
        self._context_of_all = ssl.create_default_context()
        super().__init__(host, port, context=self._context_of_all)
        self._addresses, self._end = addresses, end
        self._connected: socket.socket | None = None  # `sock` goes once an answer has begun

    def connect(self) -> None:
        """Connect."""
        for number, address in enumerate(self._addresses, start=1):
            try:
                left = max(self._end - time.monotonic(), 0.001)
                plainly = socket.create_connection((address, self.port), timeout=left)
                break
            except OSError:
                if number == len(self._addresses):
                    raise
        # Known before the handshake, so that `cut` reaches it.
        self.sock = self._context_of_all.wrap_socket(plainly, server_hostname=self.host, do_handshake_on_connect=False)
        self._connected = self.sock
        self.sock.do_handshake()

    def cut(self) -> None:
        """End the connection, from another thread, whatever is being waited for."""
        try:
            if self._connected is not None:
                # Not SSLSocket's own, which would have the other thread read on without decrypting.
                socket.socket.shutdown(self._connected, socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already


def _refused(text: str) -> ApiError:
    return ApiError(400, text, code=INVALID)
