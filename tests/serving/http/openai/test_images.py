"""Where images may come from: a request makes the server read no file and ask no machine that it should not.

A real host with https, on this machine, is asked; for that, its address is let through where a test says so.
"""

from __future__ import annotations

import base64
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.images import ImageSources, is_public

PICTURE = bytes(range(256)) * 8
MOST = 4096


class Host(BaseHTTPRequestHandler):
    """Has a picture, redirects of all kinds, and an answer that never ends; notes who asks."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers['Host']}{self.path}")
        path = self.path.partition("?")[0]
        if path == "/picture":
            self.answer(200, PICTURE)
        elif path == "/large":
            self.answer(200, b"x" * (MOST + 1))
        elif path == "/short":
            self.answer(200, PICTURE, length=len(PICTURE) + 9)
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                self.close_connection = True
        elif path.startswith("/to/"):
            self.answer(302, b"", Location=self.path.removeprefix("/to/"))
        else:
            self.answer(404, b"")

    def answer(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadingHTTPServer]:
    folder = tmp_path_factory.mktemp("host")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    Host.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = str(certificate)
    yield server
    os.environ.pop("SSL_CERT_FILE") if before is None else os.environ.update(SSL_CERT_FILE=before)
    server.shutdown()
    server.server_close()


Read = Callable[[str], bytes]


@pytest.fixture
def read(host: ThreadingHTTPServer) -> Read:
    """Read a path of the host, from a server that takes this machine's address for a public one."""
    sources = ImageSources(["localhost"], most=MOST, seconds=1.0, public=lambda address: True, port=host.server_port)
    return lambda path: sources.read(f"https://localhost:{host.server_port}{path}", "here")


def said_of(read: Callable[[], bytes]) -> str:
    with pytest.raises(ApiError) as refused:
        read()
    assert (refused.value.status, refused.value.code) == (400, "invalid_image_url")
    return refused.value.text


def test_an_image_in_the_request_is_decoded() -> None:
    sources = ImageSources()
    written = base64.b64encode(PICTURE).decode()
    assert sources.read(f"data:image/png;base64,{written}", "here") == PICTURE
    assert sources.read(f"DATA:image/webp;charset=x;BASE64,{written}", "here") == PICTURE
    assert said_of(lambda: sources.read("data:image/png;base64,a%%a", "here")) == "here is not valid base64."
    assert "begin with data:" in said_of(lambda: sources.read("data:image/png,plain", "here"))


@pytest.mark.parametrize(
    "url", ["https://localhost/a.png", "http://localhost/a.png", "file:///etc/passwd", "ftp://x/a.png", "a.png", ""]
)
def test_nothing_else_is_read_unless_flags_allow_it(url: str) -> None:
    assert said_of(lambda: ImageSources().read(url, "here")).startswith("here")


def test_an_allowed_host_is_asked_by_its_name_and_may_redirect_within_the_list(read: Read) -> None:
    Host.asked.clear()
    assert read("/picture?size=5") == PICTURE
    assert Host.asked[0].startswith("localhost:") and Host.asked[0].endswith("/picture?size=5")
    assert read("/to//to//picture") == PICTURE


def test_another_host_another_port_and_plain_http_are_never_asked(host: ThreadingHTTPServer, read: Read) -> None:
    port = host.server_port
    sources = ImageSources(["images.example"], public=lambda address: True, port=port)
    Host.asked.clear()
    for url in (f"https://localhost:{port}/picture", f"https://localhost:{port}@images.example:1/", "https:///x"):
        assert "--allowed-media-domains" in said_of(lambda url=url: sources.read(url, "here"))  # type: ignore[misc]
    assert not Host.asked
    for onward in ("https://127.0.0.1:1/picture", f"http://localhost:{port}/picture", "file:///etc/passwd"):
        assert "--allowed-media-domains" in said_of(lambda onward=onward: read(f"/to/{onward}"))  # type: ignore[misc]
    assert len(Host.asked) == 3  # the redirects alone


def test_a_name_that_leads_into_a_private_network_is_not_asked(
    host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only one of its addresses does."""
    sources = ImageSources(["localhost"], port=host.server_port)
    Host.asked.clear()
    url = f"https://localhost:{host.server_port}/picture"
    assert said_of(lambda: sources.read(url, "here")) == "here: that host is in a private network."
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert "private network" in said_of(lambda: sources.read(url, "here"))
    assert not Host.asked


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers differently the second time leads nowhere else."""
    looked = []
    original = socket.getaddrinfo

    def once(name: str, *rest: Any, **more: Any) -> Any:
        if name == "localhost":
            looked.append(name)
            name = "127.0.0.1" if len(looked) == 1 else "127.0.0.2"
        return original(name, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", once)
    sources = ImageSources(["localhost"], public=lambda address: address == "127.0.0.1", port=host.server_port)
    assert sources.read(f"https://localhost:{host.server_port}/picture", "here") == PICTURE
    assert looked == ["localhost"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/large", "the image has more than 4,096 bytes"),
        ("/short", "cannot be fetched"),
        ("/slow", "did not arrive within 1 seconds"),
        ("/nowhere", "status 404"),
        ("/to/" * 9, "behind more than 3 redirects"),
    ],
)
def test_what_is_too_large_too_slow_or_not_there_is_refused(read: Read, path: str, said: str) -> None:
    assert said in said_of(lambda: read(path))


def test_a_host_without_a_certificate_of_its_name_is_refused(
    host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    sources = ImageSources(["localhost"], public=lambda address: True, port=host.server_port)
    url = f"https://localhost:{host.server_port}/picture"
    assert "cannot be fetched" in said_of(lambda: sources.read(url, "here"))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::"),
        *("fec0::1", "192.0.0.192", "64:ff9b:1::7f00:1", "::127.0.0.1", "::ffff:0:127.0.0.1", "5f00::1", "3fff::1"),
    ],
)
def test_addresses_of_networks_of_ones_own_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    assert is_public("8.8.8.8") and is_public("2001:4860:4860::8888") and is_public("64:ff9b::808:808")


def test_files_are_read_in_one_folder_links_followed(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "a b.png").write_bytes(PICTURE)
    (folder / "large.png").write_bytes(b"x" * (MOST + 1))
    outside = tmp_path / "secret.png"
    outside.write_bytes(PICTURE)
    (folder / "link.png").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")
    sources = ImageSources(folder=folder, most=MOST)
    assert sources.read(f"file://{folder}/more/a%20b.png", "here") == PICTURE
    assert sources.read(f"file://localhost{folder}/more/../more/a%20b.png", "here") == PICTURE
    refused = {
        said_of(lambda url=url: sources.read(url, "here"))  # type: ignore[misc]
        for url in (
            *(f"file://{outside}", f"file://{folder}/../secret.png", f"file://{folder}/link.png", f"file://{folder}"),
            *(f"file://{folder}/nothing.png", f"file://{folder}/more", f"file://{folder}/pipe.png"),
            *(f"file://{folder}/large.png", f"file://elsewhere{folder}/more/a%20b.png", "file:///etc/passwd"),
            f"file://{folder}/%00",
        )
    }
    assert len(refused) == 1, "an error tells which files there are"


def test_a_flag_that_is_no_host_is_refused_by_its_name() -> None:
    with pytest.raises(ArgumentsError, match="--allowed-media-domains https://x"):
        ImageSources(["https://x/"])
