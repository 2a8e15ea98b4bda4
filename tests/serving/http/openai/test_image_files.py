"""How the images of a request are read: `serving/http/openai/image_files.py`. Where they may come from: test_images.py.

Hosts are stood in for by a class that answers when the test says so.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.openai import image_files
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.image_files import OF_ONE_REQUEST, ImageFiles
from llava_steering_plugin.serving.http.openai.images import ImageSources

SLOW = [f"https://slow/{number}" for number in range(8)]
IN_REQUEST = "data:image/png;base64,AAAA"


class Hosts(ImageSources):
    """Hosts of which one is slow, one quick, and one broken; notes what they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.broken = threading.Event()
        self.begun: list[str] = []
        self.came = threading.Semaphore(0)

    def _fetched(self, url: str) -> bytes:
        self.begun.append(url)
        self.came.release()
        if "broken" in url:
            assert self.broken.wait(60)
            raise ApiError(400, "it is broken.")
        assert "slow" not in url or self.go.wait(60)
        return url.encode()

    async def asked(self, count: int) -> None:
        """Wait until so many more images have been asked for."""
        for _ in range(count):
            assert await asyncio.to_thread(self.came.acquire, timeout=60)


class Client:
    """Waits for an answer until it hangs up."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def places(*urls: str) -> list[tuple[str, str]]:
    return [(f"messages[0].content[{number}].image_url", url) for number, url in enumerate(urls)]


async def others_ended() -> None:
    """Wait until nothing is left of what this test has begun."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


def run(test: Callable[[Hosts], Awaitable[None]]) -> None:
    async def whole() -> None:
        hosts = Hosts()
        try:
            await test(hosts)
        finally:
            hosts.go.set()
            hosts.broken.set()

    asyncio.run(whole())


def test_files_come_in_the_order_of_their_places() -> None:
    async def test(hosts: Hosts) -> None:
        urls = ["https://quick/a", IN_REQUEST, "https://quick/b"]
        files = await ImageFiles(hosts, Limits()).read(places(*urls), Client().receive)
        assert files == [b"https://quick/a", b"\0\0\0", b"https://quick/b"]

    run(test)


def test_images_in_a_request_wait_for_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "FETCHING", 1)

    async def test(hosts: Hosts) -> None:
        images = ImageFiles(hosts, Limits())
        slow = asyncio.ensure_future(images.read(places(SLOW[0]), Client().receive))
        await hosts.asked(1)
        assert await asyncio.wait_for(images.read(places(IN_REQUEST), Client().receive), 60) == [b"\0\0\0"]
        with pytest.raises(ApiError, match="image_url: files are not read here"):
            await asyncio.wait_for(images.read(places("file:///a.png"), Client().receive), 60)
        assert not slow.done()
        hosts.go.set()
        await slow

    run(test)


def test_one_request_leaves_threads_to_the_others() -> None:
    async def test(hosts: Hosts) -> None:
        images = ImageFiles(hosts, Limits())
        slow = asyncio.ensure_future(images.read(places(*SLOW), Client().receive))
        await hosts.asked(4)
        assert await images.read(places("https://quick/a"), Client().receive) == [b"https://quick/a"]
        assert sorted(hosts.begun) == ["https://quick/a", *SLOW[:4]]
        hosts.go.set()
        assert await slow == [url.encode() for url in SLOW]

    run(test)


def test_after_an_image_that_fails_the_rest_is_not_asked_for() -> None:
    async def test(hosts: Hosts) -> None:
        urls, client = ["https://broken/", *SLOW], Client()
        reading = asyncio.ensure_future(ImageFiles(hosts, Limits()).read(places(*urls), client.receive))
        await hosts.asked(OF_ONE_REQUEST)
        hosts.broken.set()
        with pytest.raises(ApiError, match="it is broken"):
            await reading
        client.gone.set()
        hosts.go.set()
        await others_ended()
        assert sorted(hosts.begun) == sorted(urls[:OF_ONE_REQUEST])

    run(test)


def test_images_that_nobody_waits_for_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that wait for their turn, nor those that wait for a thread."""
    monkeypatch.setattr(image_files, "FETCHING", 1)

    async def test(hosts: Hosts) -> None:
        images, client = ImageFiles(hosts, Limits()), Client()
        reading = asyncio.ensure_future(images.read(places(*SLOW), client.receive))
        await hosts.asked(1)
        client.gone.set()
        with pytest.raises(ClientDisconnect):
            await reading
        hosts.go.set()
        await others_ended()
        await images.read(places("https://quick/a"), Client().receive)
        assert hosts.begun == [SLOW[0], "https://quick/a"]

    run(test)


def test_images_that_do_not_arrive_in_time_or_are_too_large_together_are_refused() -> None:
    async def test(hosts: Hosts) -> None:
        with pytest.raises(ApiError) as late:
            await ImageFiles(hosts, Limits(receive_seconds=0.01)).read(places(*SLOW), Client().receive)
        assert (late.value.status, late.value.code) == (400, "invalid_image_url")
        assert late.value.text == "The images did not arrive within 0.01 seconds."
        with pytest.raises(ApiError, match="more than 5 bytes") as large:
            await ImageFiles(hosts, Limits(body_bytes=5)).read(places(*[IN_REQUEST] * 2), Client().receive)
        assert large.value.status == 413

    run(test)
