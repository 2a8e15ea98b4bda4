"""Clients that hang up, are slow, or come in a crowd: `serving/http/limits.py` and `serving/http/admission.py`.

Headers that h11 cannot read: `serving/http/connections.py`.

What the log holds of them, too.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psutil
import pytest
import requests
from ports import free_port
from serving_fixtures import BASE_NAME, STRICT, Alone, Client, Question, holding, listening, wait_until

from llava_steering_plugin.serving.http.app import KEEP_ALIVE, build
from llava_steering_plugin.serving.http.validation import CheckedRequest, check_request
from llava_steering_plugin.serving.worker import bind

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.usefixtures("unharmed")

HEAD = b"POST /worker_generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def test_a_request_that_never_arrives_is_given_up(strict: Client) -> None:
    host, _, port = strict.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(HEAD % 500 + b"{")
        assert b" 408 " in connection.recv(4096)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(HEAD % 500 + b"{")


@pytest.mark.parametrize("length", [b"9" * 20, b"9" * 5000, b"0" * 5000 + b"9" * 5000])
def test_a_length_of_thousands_of_digits_is_a_413(strict: Client, length: bytes) -> None:
    host, _, port = strict.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = b"POST /worker_generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\n"
        connection.sendall(head % length)
        assert b" 413 " in connection.recv(4096).partition(b"\r\n")[0]


def test_more_than_may_wait_are_a_503_at_once_and_the_others_are_answered(
    worker: Any, alone: Alone, asked: list[Question]
) -> None:
    app = build(worker, replace(STRICT, running=1, batch=2, waiting=2))
    with listening(app, free_port()) as client, ThreadPoolExecutor(3) as users, holding(worker) as go:
        answers = [users.submit(client.answer, "dogs", asked[0])]
        wait_until(lambda: len(client.slots.running) == 1)
        answers += [users.submit(client.answer, "dogs", asked[0]) for _ in range(2)]
        wait_until(lambda: len(client.slots.waiting) == 2)
        full = client.post(asked[0].body("dogs"))
        assert full.status_code == 503 and full.headers["Retry-After"]
        assert json.loads(full.content[:-1])["error_code"] != 0
        go.set()
        assert {answer.result() for answer in answers} == {alone("dogs", asked[0])}


def test_clients_that_hang_up_at_any_moment_leave_no_slot_taken(strict: Client, asked: list[Question]) -> None:
    """Again and again, and more at once than there are slots; the fixture looks at what is left."""
    host, _, port = strict.address.removeprefix("http://").partition(":")
    content = json.dumps(Question(asked[0].prompt, asked[0].image, 300).body("pets")).encode()

    def hang_up(number: int) -> None:
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            sent = HEAD % len(content) + content
            connection.sendall(sent if number % 4 else sent[: len(sent) // 2])
            if number % 2:  # with a reset, rather than politely
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.02 * (number % 5))

    with ThreadPoolExecutor(16) as users:
        list(users.map(hang_up, range(48)))


def test_while_too_many_connections_are_open_every_request_is_a_503_also_if_the_others_send_nothing(
    worker: Any,
) -> None:
    app = build(worker, STRICT)
    with listening(app, free_port(), limit_concurrency=STRICT.connections) as client, ExitStack() as opened:
        host, _, port = client.address.removeprefix("http://").partition(":")
        for number in range(STRICT.connections + 20):  # none is refused
            connection = opened.enter_context(socket.create_connection((host, int(port)), timeout=30))
            if number % 2:
                connection.sendall(b"POST /worker_generate_stream HTTP/1.1\r\n")
        assert requests.get(f"{client.address}/health", timeout=30).status_code == 503
        opened.close()
        wait_until(lambda: requests.get(f"{client.address}/health", timeout=30).ok)


def test_the_workers_own_socket_finds_out_about_clients_that_have_vanished() -> None:
    with bind("127.0.0.1", free_port()) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_client_that_connects_before_the_application_serves_waits_and_is_answered(worker: Any) -> None:
    port = free_port()
    listener = bind("127.0.0.1", port)  # as while the model is loaded
    with ExitStack() as opened:
        early = [opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(3)]
        for connection in early:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        early[0].close()  # one that has not waited
        with listening(build(worker, STRICT), port, listener=listener) as client:
            assert all(connection.recv(4096).startswith(b"HTTP/1.1 200") for connection in early[1:])
            assert client.health()["status"] == "ok"


def test_a_slow_reader_holds_no_slot_and_is_given_up_in_the_end(worker: Any, asked: list[Question]) -> None:
    """It reads nothing of an answer that does not fit into the buffers between: the prompt comes with every state."""
    content = json.dumps(Question("<image>" + "word " * 380, asked[0].image, 300).body("cats")).encode()
    with listening(build(worker, STRICT), free_port(), send_buffer=4096) as client, socket.socket() as connection:
        host, _, port = client.address.removeprefix("http://").partition(":")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        connection.sendall(HEAD % len(content) + content)
        wait_until(lambda: client.free() == 3)
        wait_until(lambda: client.free() == 4, 120)
        assert client.answer("dogs", asked[0])
        wait_until(lambda: client.health()["open"] == 0)
        peer = connection.getsockname()  # the kernel's patience began with its first probe: it may end somewhat later
        wait_until(lambda: all(end.raddr != peer for end in psutil.Process().net_connections("tcp")))
        with pytest.raises(ConnectionError):  # not the end of an answer: the connection is gone
            while connection.recv(65536):
                pass


def test_while_a_client_reads_slowly_nothing_of_what_it_has_asked_is_kept(
    worker: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[weakref.ref[CheckedRequest]] = []

    def noting(*arguments: Any) -> CheckedRequest:
        request = check_request(*arguments)
        kept.append(weakref.ref(request))
        return request

    monkeypatch.setattr("llava_steering_plugin.serving.http.app.check_request", noting)
    content = json.dumps(Question("<image>" + "word " * 380, asked[0].image, 300).body("cats")).encode()
    patient = build(worker, replace(STRICT, stall_seconds=60))
    with listening(patient, free_port(), send_buffer=4096) as client, socket.socket() as connection:
        host, _, port = client.address.removeprefix("http://").partition(":")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        connection.sendall(HEAD % len(content) + content)
        wait_until(lambda: client.free() == 3)
        wait_until(lambda: client.free() == 4, 120)
        wait_until(lambda: kept[0]() is None)
        assert client.health()["open"] == 1, "the client was not slow: nothing is shown"


def test_a_client_that_goes_on_or_stops_sending_what_is_too_long_is_told_so_in_the_time_there_is(
    strict: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_steering_plugin.serving.http.protocol.DRAINED_SECONDS", 0.5)
    host, _, port = strict.address.removeprefix("http://").partition(":")
    for sent in (b"", b"x" * STRICT.body_bytes):
        started = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(HEAD % (STRICT.body_bytes + 1) + sent)  # and no more
            assert b" 413 " in connection.recv(4096)
        assert time.monotonic() - started > 0.4, "it was not told at the end of the time, but at once"


def test_an_answer_that_begins_late_is_waited_for(
    strict: Client, worker: Any, alone: Alone, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's page gives up after 10 seconds without a byte, its worker after 15: here something comes every few."""
    monkeypatch.setattr("llava_steering_plugin.serving.http.app.KEEP_ALIVE_SECONDS", 0.1)
    held = threading.Event()
    handle = worker.model.lm_head.register_forward_hook(lambda *_: held.wait(60) and None)
    received = b""
    try:
        for byte in strict.post(asked[0].body("cats"), stream=True).iter_content(1):
            received += byte
            if received == 3 * KEEP_ALIVE:
                held.set()  # now the answer begins
    finally:
        held.set()
        handle.remove()
    assert received.startswith(3 * KEEP_ALIVE)
    states = [json.loads(part) for part in received.split(b"\0") if part]
    assert states[-1]["text"].removeprefix(asked[0].prompt).strip() == alone("cats", asked[0])


def test_the_log_holds_nothing_of_what_was_asked_and_answered_unless_it_is_asked_to(
    worker: Any, strict: Client, alone: Alone, asked: list[Question], caplog: pytest.LogCaptureFixture
) -> None:
    secret = Question("A chat. USER: <image>\nWho is xyzzy? ASSISTANT:", asked[0].image)
    with caplog.at_level(logging.DEBUG, "llava_steering_plugin"):
        answer = strict.answer("cats", secret)
        strict.refused(secret.body("xyzzy"))
        strict.refused(secret.body("cats") | {"stop": ["xyzzy"]})
        wait_until(lambda: "answered after" in caplog.text)
        quiet = caplog.text
        with listening(build(worker, STRICT, log_requests=True), free_port()) as talkative:
            assert talkative.answer("cats", secret) == answer
        wait_until(lambda: caplog.text.count("answered after") == 2)
    assert f"cats: {len(secret.prompt)} characters, 1 image(s)" in quiet
    assert "xyzzy" not in quiet and answer not in quiet
    assert "xyzzy" in caplog.text and answer in caplog.text


def test_no_name_of_a_model_is_one_of_the_pool_that_is_not_shown(strict: Client, worker: Any) -> None:
    assert worker.catalog.find(BASE_NAME) == worker.pool.BASE
    assert worker.catalog.find(worker.pool.BASE) is None
