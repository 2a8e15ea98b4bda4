"""With a proxy in the environment, programs of the server still reach this machine, and only this one, directly."""

from __future__ import annotations

import http.server
import io
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ports import free_port
from rich.console import Console

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.serving import page
from llava_steering_plugin.serving.processes import Program, Programs
from llava_steering_plugin.serving.proxies import bypass_proxies, bypassing, call, host_of, is_loopback

VARIABLES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every POST with 200."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


class SixServer(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A proxy in the environment that nobody answers at."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.setenv("all_proxy", address)
    monkeypatch.setenv("no_proxy", "")  # so that what a test sets is taken back
    monkeypatch.setenv("NO_PROXY", "")
    yield address


@pytest.fixture(params=["127.0.0.1", "localhost", "127.0.0.3", "[::1]"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of this machine under each of its names."""
    try:
        server = SixServer(("::1", 0), Answering) if request.param == "[::1]" else None
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    server = server or http.server.ThreadingHTTPServer(("0.0.0.0", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{request.param}:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_serve_sees_its_programs_answer_whatever_proxy_there_is(proxy: str, url: str) -> None:
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.post(url, timeout=5)  # the proxy is in force
    answer = call("POST", url)
    assert answer is not None and answer.json() == {}


def test_a_process_reaches_this_machine_directly_once_it_bypasses_proxies(proxy: str, url: str) -> None:
    bypass_proxies(url)
    assert requests.post(url, timeout=5).ok


def test_other_machines_are_still_called_through_the_proxy(proxy: str) -> None:
    bypass_proxies("http://machine-a:10000")
    with pytest.raises(requests.exceptions.ProxyError):
        requests.post("http://machine-a:10000", timeout=5)


def test_what_the_environment_excludes_stays_excluded() -> None:
    assert bypassing({"no_proxy": "here.example, there", "NO_PROXY": "ignored"}) == dict.fromkeys(
        ("no_proxy", "NO_PROXY"), "here.example,there,localhost,127.0.0.1,127.0.0.0/8"
    )
    assert bypassing({"NO_PROXY": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}


def test_the_programs_of_serve_get_the_variables(proxy: str, tmp_path: Path) -> None:
    said = io.StringIO()
    with Programs(Console(file=said, width=200), tmp_path, tmp_path) as programs:
        program = Program("worker", ["-c", "import os; print(os.environ['no_proxy'])"], lambda: False)
        program.environment.update(bypassing(os.environ))
        programs.start(program)
        programs._running[0][1].wait(60)
    assert "localhost,127.0.0.1" in said.getvalue()


def test_a_worker_bypasses_proxies_before_it_calls_anything(proxy: str) -> None:
    from llava_steering_plugin.serving.worker import app

    words = ["--model-path", "no/model", "--adapter-dir", "nowhere", "--controller-address", "http://[::1]:9"]
    with pytest.raises(SteeringError, match="nowhere"):
        app(words, standalone_mode=False)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "localhost,127.0.0.1,127.0.0.0/8,::1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "*"),
        (["--controller-url", "http://[::1]:9"], "*"),
        (["--share"], "localhost,127.0.0.1,127.0.0.0/8"),
        (["--controller-url=http://machine-a:9"], "localhost,127.0.0.1,127.0.0.0/8"),
    ],
)
def test_a_page_that_calls_this_machine_only_uses_no_proxy(proxy: str, words: list[str], expected: str) -> None:
    page._keep_calls_direct(words)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.1.2.3", "::1", "[::1]"])
def test_these_hosts_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "127.0.0.1.example", "10.0.0.1", "0.0.0.0", "::", "", "127.1"])
def test_these_hosts_are_not(host: str) -> None:
    assert not is_loopback(host)


def test_the_host_of_a_url_is_found_without_port_and_brackets() -> None:
    assert host_of("http://[::1]:9/x") == "::1"
    assert host_of("http://User@Host:80") == "host"
    assert host_of("no url") == host_of("http://[") == ""
