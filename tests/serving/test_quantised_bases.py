"""Many adapters on a base that is packed into 4 or 8 bits: each answers as it does alone on such a base."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asking import Question as Spoken
from ports import free_port
from quantising import quantised_asker, quantising_on_cpu
from serving_fixtures import BASE_NAME, Client, Question, listening
from tiny_llava import TinyLlava

pytest_plugins = ["serving_fixtures"]

SERVED = ("cats", "dogs", "routed")


@pytest.fixture(scope="module", params=[4, 8], ids=["4 bits", "8 bits"])
def bits(request: pytest.FixtureRequest, patched_llava: Path) -> Iterator[int]:
    with quantising_on_cpu():
        yield request.param


@dataclass(frozen=True)
class Served:
    client: Client
    model: Any


@pytest.fixture(scope="module")
def served(bits: int, tiny: TinyLlava, shelf: Path) -> Iterator[Served]:
    """A worker as `--load-4bit` or `--load-8bit` makes it."""
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.limits import Limits
    from llava_steering_plugin.serving.model_worker import AdapterWorker

    worker = AdapterWorker(
        str(tiny.llava),
        controller="http://127.0.0.1:9",
        address="http://127.0.0.1:9",
        device="cpu",
        load_4bit=bits == 4,
        load_8bit=bits == 8,
    )
    for name in SERVED:
        worker.catalog.put(name, str(shelf / name))
    with listening(build(worker, Limits(running=2)), free_port()) as client:
        yield Served(client, worker.model)


def test_a_worker_on_a_packed_base_answers_with_each_adapter_as_it_does_alone(
    served: Served, bits: int, tiny: TinyLlava, shelf: Path, asked: list[Question]
) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    packed = {4: Linear4bit, 8: Linear8bitLt}[bits]
    assert isinstance(served.model.model.layers[0].mlp.up_proj, packed)
    names = [BASE_NAME, *SERVED]
    questions = [asked[0], asked[-1]]
    with ThreadPoolExecutor(8) as users:
        together = dict(
            zip(
                [(name, place) for name in names for place in range(2)],
                users.map(served.client.answer, [name for name in names for _ in range(2)], 4 * questions),
                strict=True,
            )
        )
    assert len({together[name, 0] for name in names}) > 1, "the adapters change nothing"
    ask = quantised_asker(tiny.images, bits)
    for (name, place), answer in together.items():
        if name != BASE_NAME:
            image = questions[place].image
            prompt, tokens = questions[place].prompt, questions[place].tokens
            assert answer == ask.complete(shelf / name, prompt, image and image.name, max_new_tokens=tokens)


def test_the_chat_on_a_packed_base_answers_as_upstreams_loader_does(bits: int, tiny: TinyLlava, shelf: Path) -> None:
    from llava_steering_plugin.chat.session import open_chat

    question = Spoken("What color is the circle?", "00.png")
    chat = open_chat(
        str(shelf / "cats"),
        {"cats": str(shelf / "cats")},
        first="cats",
        load_4bit=bits == 4,
        load_8bit=bits == 8,
        temperature=0.0,
        max_new_tokens=8,
    )
    chat.look_at(str(tiny.images / "00.png"))
    pieces: list[str] = []
    chat.ask(question.text, pieces.append)
    ask = quantised_asker(tiny.images, bits)
    assert "".join(pieces).strip() == ask(shelf / "cats", question, conversation="llava_v1", max_new_tokens=8)
