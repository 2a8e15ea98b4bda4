"""A running worker with eight adapters, in this process and over real HTTP, and what each adapter answers alone.

A test module asks for them with `pytest_plugins = ["serving_fixtures"]`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from PIL import Image
from ports import free_port
from steered import load_llava, strengthen
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, joint, load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.modes.peft.mode import Peft
from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import End, GenerationRequest, Piece
from llava_steering_plugin.serving.http.limits import Limits

PATIENCE = 120
TOKEN = "a-token-that-is-long-enough"
WITH_PROJECTOR = ("birds", "routed")
MODES: dict[str, Mode] = {"mixlora-x": MixLoRA(factors=4, rank=2)}
MODES |= {"dogs": Peft("ia3"), "fish": Peft("lora", '{"r": 2}')}
MODES["routed"] = joint(MoReS(rank=2, tokens="f4+l5"), MODES["mixlora-x"])
NAMES = ("cats", "dogs", "pets", "birds", "fish", "mixlora-x", "my-mpt", "routed")
BASE_NAME = "llava-v1.5-tiny"
PROMPT = "A chat. USER: <image>\nWhat is in the picture? ASSISTANT:"
TEXT_PROMPT = "A chat. USER: What do you like? ASSISTANT:"


@pytest.fixture(scope="session")
def shelf(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight adapters of MoReS, MixLoRA, both at once and PEFT's methods; read it, never write to it."""
    folder = tmp_path_factory.mktemp("shelf")
    model = load_llava(tiny.llava)
    for seed, name in enumerate(NAMES):
        mode = MODES.get(name, MoReS(rank=2, tokens="all"))
        attachment = strengthen(attach(model, mode), seed=seed)
        attachment.config = replace(describe(attachment), conversation="v1")
        if name in WITH_PROJECTOR:
            generator = torch.Generator().manual_seed(100 + seed)
            for own, value in image_parameters(model).items():
                value.data += 0.3 * torch.randn(value.shape, generator=generator)
                attachment.extras.add(own)
        save_adapter(model, folder / name)
        remove(model)
    return folder


@dataclass(frozen=True)
class Question:
    """What a client sends, but for the model."""

    prompt: str = PROMPT
    image: Path | None = None
    tokens: int = 8

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": self.prompt,
            "temperature": 0.0,
            "top_p": 1.0,
            "max_new_tokens": self.tokens,
            "stop": "</s>",
            "images": [base64.b64encode(self.image.read_bytes()).decode()] if self.image else [],
        }

    def asked(self, name: str, **more: Any) -> GenerationRequest:
        """The same for the worker itself; `name` is the pool's."""
        images = (self.image.read_bytes(),) if self.image else ()
        given = {"max_new_tokens": self.tokens, "temperature": 0.0, "stop": ("</s>",)}
        return GenerationRequest(adapter=name, prompt=self.prompt, images=images, **(given | more))


Made = tuple[str, End]


async def read(answer: Answer) -> Made:
    """The text and the end of an answer."""
    events = [event async for event in answer]
    assert isinstance(events[-1], End)
    return "".join(event.text for event in events if isinstance(event, Piece)), events[-1]


def made(worker: Any, *requests: GenerationRequest, batch: int = 1, slots: int = 1) -> list[Made]:
    """The answers that a worker makes of requests that come at once, without HTTP."""

    async def make() -> list[Made]:
        opened = worker.open_slots(slots, batch, lambda: None)
        return await asyncio.gather(*(read(opened.ask(request)) for request in requests))

    return asyncio.run(make())


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def body(**changes: Any) -> dict[str, Any]:
    """A good request with one picture, changed; None takes a field out."""
    good = Question(PROMPT).body("cats") | {"images": [encoded(Image.new("RGB", (40, 60), "red"))]}
    return {key: value for key, value in (good | changes).items() if value is not None}


@pytest.fixture(scope="session")
def asked(tiny: TinyLlava) -> list[Question]:
    """Eight questions, one of them without an image."""
    images = sorted(tiny.images.iterdir())[:7]
    return [*(Question(image=image) for image in images), Question(TEXT_PROMPT)]


Alone = Callable[[str | None, Question], str]


@pytest.fixture(scope="session")
def alone(tiny: TinyLlava, shelf: Path, patched_llava: Path) -> Alone:
    """The greedy answer of one adapter (None: of the base), with nothing else on a model of its own, in float32."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    tokenizer, model, processor, _ = load_pretrained_model(str(tiny.llava), None, BASE_NAME, device="cpu")
    model.float()
    known: dict[tuple[str | None, Question], str] = {}

    def answer(name: str | None, question: Question) -> str:
        if (name, question) not in known:
            images: dict[str, Any] = {}
            if question.image:
                picture = Image.open(question.image).convert("RGB")
                pixels = process_images([picture], processor, model.config)
                images = {"images": pixels, "image_sizes": [picture.size]}
            ids = tokenizer_image_token(question.prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
            if name is not None:
                load_adapter(model, shelf / name)
            output = model.generate(ids, do_sample=False, max_new_tokens=question.tokens, **images)
            if name is not None:
                remove(model)
            known[name, question] = tokenizer.decode(output[0], skip_special_tokens=True).strip()
        return known[name, question]

    return answer


@dataclass(frozen=True)
class Client:
    """Talks to a worker as upstream's page does; `slots` are the worker's own, where it runs in this process."""

    address: str
    slots: Any = None

    def free(self) -> int:
        """How many more answers could be generated at this moment."""
        return int(self.slots.free)

    def post(self, body: Any, **options: Any) -> requests.Response:
        where = f"{self.address}/worker_generate_stream"
        return requests.post(where, **({"json": body, "timeout": PATIENCE} | options))

    def states(self, model: str, question: Question) -> list[dict[str, Any]]:
        response = self.post(question.body(model), stream=True)
        assert response.status_code == 200, response.text
        return [json.loads(part) for part in response.iter_lines(delimiter=b"\0") if part]

    def answer(self, model: str, question: Question) -> str:
        states = self.states(model, question)
        assert all(state["error_code"] == 0 for state in states), states[-1]
        return str(states[-1]["text"]).removeprefix(question.prompt).strip()

    def refused(self, body: Any, **options: Any) -> tuple[int, str]:
        """The status and the text of an error that upstream's page can show."""
        response = self.post(body, **options)
        [state] = [json.loads(part) for part in response.content.split(b"\0") if part]
        assert state["error_code"] != 0
        return response.status_code, state["text"]

    def health(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.address}/health", timeout=PATIENCE).json())

    def admin(self, method: str, path: str = "", token: str = TOKEN, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.request(
            method, f"{self.address}/admin/adapters{path}", headers=headers, timeout=PATIENCE, **options
        )

    @contextmanager
    def begun(self, body: dict[str, Any]) -> Iterator[socket.socket]:
        """A connection over which an answer has begun to come; closed, whatever is still on its way, at the end."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        content = json.dumps(body).encode()
        head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            connection.sendall(head.encode() + content)
            received = b""
            while b'"error_code"' not in received:
                part = connection.recv(4096)
                assert part, f"the connection was closed before an answer had begun: {received!r}"
                received += part
            yield connection


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def holding(worker: Any) -> Iterator[threading.Event]:
    """Has a worker make no answer until the event is set, and at the end of the block at the latest."""
    go = threading.Event()

    def held(*_: Any) -> None:
        assert go.wait(PATIENCE)

    handle = worker.model.model.register_forward_pre_hook(held)
    try:
        yield go
    finally:
        go.set()
        handle.remove()


@contextmanager
def listening(
    app: Any,
    port: int,
    send_buffer: int | None = None,
    listener: socket.socket | None = None,
    ending: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Client]:
    """Serves an application from a thread of this process; on `listener` if there is one that listens on `port`.

    `ending` is called when the server has been told to end, as by SIGTERM.
    """
    import uvicorn

    from llava_steering_plugin.serving.http.app import give_up_stalled
    from llava_steering_plugin.serving.http.connections import Connection
    from llava_steering_plugin.serving.worker import bind

    listener = listener or bind("127.0.0.1", port)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    give_up_stalled(listener, app.state.admission.limits.stall_seconds)

    options = {"timeout_graceful_shutdown": 1, **options}
    config = uvicorn.Config(app, "127.0.0.1", port, http=Connection, log_config=None, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Client(f"http://127.0.0.1:{port}", app.state.admission.slots)
    finally:
        server.should_exit = True
        ending()
        thread.join(30)


@pytest.fixture(scope="session")
def worker_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def worker(tiny: TinyLlava, shelf: Path, patched_llava: Path, worker_port: int) -> Any:
    """One worker with the eight adapters, in float32: tests that change its catalog put it back."""
    from llava_steering_plugin.serving.model_worker import AdapterWorker

    worker = AdapterWorker(
        str(tiny.llava),
        controller="http://127.0.0.1:9",
        address=f"http://127.0.0.1:{worker_port}",
        device="cpu",
    )
    worker.model.float()  # upstream's loader makes it half, in which rows of a batch may round otherwise than alone
    for name in NAMES:
        worker.catalog.put(name, str(shelf / name))
    return worker


@pytest.fixture(scope="session")
def client(worker: Any, worker_port: int) -> Iterator[Client]:
    """The worker's HTTP side with room for 64 requests, four at a time."""
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.limits import Limits

    with listening(build(worker, Limits(running=4, waiting=60, body_bytes=1 << 20)), worker_port) as client:
        yield client


STRICT = Limits(
    running=4,
    waiting=4,
    body_bytes=1 << 20,
    prompt_characters=2000,
    images=2,
    image_pixels=90_000,
    receive_seconds=1.0,
    stall_seconds=1.0,
)


@pytest.fixture(scope="session")
def strict(worker: Any) -> Iterator[Client]:
    """The same worker's HTTP side with narrow limits."""
    from llava_steering_plugin.serving.http.app import build

    with listening(build(worker, STRICT), free_port()) as client:
        yield client


@pytest.fixture
def unharmed(strict: Client, alone: Alone, asked: list[Question]) -> Iterator[None]:
    """After the test the worker answers as ever, has all its slots, and nobody waits."""
    yield
    idle = {"status": "ok", "running": 0, "open": 0}.items()
    # /health is asked behind all that clients have sent, some of which the server may not have read yet.
    wait_until(lambda: strict.health().items() >= idle and strict.free() == 4 and not strict.slots.waiting)
    assert strict.answer("cats", asked[0]) == alone("cats", asked[0])
    wait_until(lambda: strict.health().items() >= idle)
