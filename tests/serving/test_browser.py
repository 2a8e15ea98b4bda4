"""Upstream's web page, as its users see it: headless Chromium in front of a real `llava-steering serve`.

The browser comes from apt (`scripts/setup.sh --browser`). A picture of the page stays in the temporary folder, and in
the folder that LLAVA_STEERING_ARTEFACTS names.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
from asking import Asker, Question
from ports import free_port
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest_plugins = ["serving_fixtures", "browser_fixtures"]
pytestmark = pytest.mark.slow

PATIENCE = 240  # seconds, for everything on a busy machine
NEW_TOKENS = 256  # a stop of the slider; long enough for the page to show an answer while it grows
CURSOR = "▌"  # ends every state of an answer but the last
ADAPTERS = ("cats", "dogs", "mixlora-x")

# Notes every state that the page shows of the newest answer; null while there is a question without one.
OBSERVE = """() => {
    const shown = who => document.querySelectorAll(`#chatbot [data-testid=${who}]`);
    window.states = [];
    new MutationObserver(() => {
        const answers = shown("bot");
        const state = answers.length < shown("user").length ? null : answers[answers.length - 1]?.innerText;
        if (state !== window.states[window.states.length - 1]) window.states.push(state);
    }).observe(document.querySelector("#chatbot"), {childList: true, subtree: true, characterData: true});
}"""
# A short answer may be whole before the page is drawn again, so its cursor need not have been seen.
ANSWERED = f"""() => {{
    const state = window.states[window.states.length - 1];
    return window.states.includes(null) && state && !state.includes("{CURSOR}");
}}"""


@pytest.fixture(scope="module")
def questions(tiny: TinyLlava) -> list[Question]:
    images = sorted(image.name for image in tiny.images.iterdir())
    return [Question("What color is the circle?", images[0]), Question("What shape is red?", images[1])]


@pytest.fixture(scope="module")
def addresses(
    tiny: TinyLlava, shelf: Path, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Where the page is, and the API of its worker."""
    folder = tmp_path_factory.mktemp("serve")
    words = ["serve", str(tiny.llava), "--adapters", *(str(shelf / name) for name in ADAPTERS), "--device", "cpu"]
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "llava_steering_plugin", *words, "--port", str(free_port())],
            cwd=folder,
            env=subprocess_environment(patched_llava, {"COLUMNS": "200"}),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + PATIENCE
        wanted = r"(?s)all is up: (http\S+).*as OpenAI's clients ask: (http\S+)"
        while (up := re.search(wanted, output.read_text())) is None:
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"serve is not up:\n{output.read_text()[-5000:]}", pytrace=False)
            time.sleep(0.2)
        yield up[1], up[2]
    finally:
        process.terminate()  # and it ends the other three
        process.wait(timeout=60)


@pytest.fixture
def address(addresses: tuple[str, str]) -> str:
    """Where the page is."""
    return addresses[0]


class Tab:
    """One tab with the page, of a user of its own."""

    def __init__(self, browser: Browser, address: str):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        # Fonts and scripts from elsewhere, which the page does without.
        context.route(lambda url: not url.startswith(address), lambda route: route.abort())
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        # The page asks for the models once more when it has loaded, and goes back to the first one then.
        with self.page.expect_response(lambda response: "/run/" in response.url):
            self.page.goto(address, wait_until="domcontentloaded")
        self.page.get_by_role("button", name="Send", exact=True).wait_for()
        self.page.evaluate(OBSERVE)
        self.page.get_by_text("Parameters").click()
        for name, value in (("Temperature", 0), ("Max output tokens", NEW_TOKENS)):
            field = self.page.get_by_label(f"number input for {name}")
            field.fill(str(value))
            field.press("Tab")

    def models(self) -> list[str]:
        """What the drop-down offers."""
        self.page.get_by_label("Dropdown").click()
        options = self.page.get_by_role("option")
        options.first.wait_for()
        shown = [option.removeprefix("✓").strip() for option in options.all_inner_texts()]
        self.page.get_by_label("Dropdown").blur()
        return shown

    def choose(self, model: str) -> None:
        self.page.get_by_label("Dropdown").click()
        self.page.get_by_role("option", name=model, exact=True).click()
        self.page.wait_for_function(
            "model => document.querySelector('input[aria-label=Dropdown]').value === model", arg=model
        )

    def send(self, text: str, image: Path | None = None) -> None:
        if image is not None:
            self.page.locator("input[type=file]").first.set_input_files(image)
            self.page.locator("[data-testid=image] img").first.wait_for()
        self.page.evaluate("() => { window.states = []; }")
        self.page.get_by_placeholder("Enter text and press ENTER").fill(text)
        self.page.get_by_role("button", name="Send", exact=True).click()

    def answer(self) -> str:
        """The answer to what was sent last, once it is whole."""
        self.page.wait_for_function(ANSWERED)
        return _words(self.states()[-1])

    def states(self) -> list[str]:
        """What the page has shown of the answer, from its first word on."""
        return [state for state in self.page.evaluate("() => window.states") if state]


def test_a_user_picks_an_adapter_uploads_an_image_and_sees_its_answer_grow_and_another_adapter_answers_otherwise(
    browser: Browser,
    address: str,
    ask: Asker,
    questions: list[Question],
    shelf: Path,
    tiny: TinyLlava,
    tmp_path: Path,
) -> None:
    question, image = questions[0], tiny.images / str(questions[0].image)
    tab = Tab(browser, address)
    assert sorted(tab.models()) == ["cats", "dogs", "llava-v1.5-tiny", "mixl.ora-x"]
    tab.choose("cats")
    tab.send(question.text, image)
    first = tab.answer()
    growing = [_words(state.replace(CURSOR, "")) for state in tab.states() if state.endswith(CURSOR)]
    _keep(tab.page, tmp_path)
    assert first == _words(ask(shelf / "cats", question, max_new_tokens=NEW_TOKENS))
    # How many of its states a busy machine shows is open; one before the last is what a stream takes.
    assert any(part != first for part in growing), "the answer came at once, not as a stream"
    assert all(first.startswith(part) for part in growing)

    tab.choose("dogs")
    tab.send(question.text, image)
    second = tab.answer()
    assert second == _words(ask(shelf / "dogs", question, max_new_tokens=NEW_TOKENS))
    assert second != first


def test_two_tabs_with_different_adapters_get_their_own_answers_at_the_same_time(
    browser: Browser, address: str, ask: Asker, questions: list[Question], shelf: Path, tiny: TinyLlava
) -> None:
    asked = {"cats": questions[0], "dogs": questions[1]}
    tabs = {name: Tab(browser, address) for name in asked}
    for name, tab in tabs.items():
        tab.choose(name)
    for name, tab in tabs.items():
        tab.send(asked[name].text, tiny.images / str(asked[name].image))
    answers = {name: tab.answer() for name, tab in tabs.items()}
    assert answers == {
        name: _words(ask(shelf / name, question, max_new_tokens=NEW_TOKENS)) for name, question in asked.items()
    }


def test_a_user_of_the_page_and_clients_of_the_api_get_their_own_answers_from_one_worker_at_the_same_time(
    browser: Browser,
    addresses: tuple[str, str],
    ask: Asker,
    questions: list[Question],
    shelf: Path,
    tiny: TinyLlava,
) -> None:
    page, api = addresses
    question, image = questions[0], tiny.images / str(questions[0].image)
    tab = Tab(browser, page)
    tab.choose("cats")
    whole = threading.Event()
    begun = threading.Barrier(len(ADAPTERS), timeout=PATIENCE)

    def client(name: str) -> set[str]:
        """The answers that one client gets, one after the other until the page has its own."""
        said = {_asked_of_api(api, name, question, image)}
        begun.wait()
        while not whole.is_set():
            said.add(_asked_of_api(api, name, question, image))
        return said

    names = ADAPTERS[1:]
    with ThreadPoolExecutor(len(names)) as clients:
        asking = [clients.submit(client, name) for name in names]
        try:
            begun.wait()
            tab.send(question.text, image)
            answer = tab.answer()
        finally:
            whole.set()
    assert answer == _words(ask(shelf / "cats", question, max_new_tokens=NEW_TOKENS))
    for name, said in zip(names, asking, strict=True):
        assert said.result() == {_words(ask(shelf / name, question, conversation="v1"))}


def _asked_of_api(api: str, model: str, question: Question, image: Path) -> str:
    picture = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question.text}]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 16, "temperature": 0}
    answered = requests.post(f"{api}/chat/completions", json=body, timeout=PATIENCE)
    assert answered.ok, answered.text
    return _words(answered.json()["choices"][0]["message"]["content"])


def _words(text: str) -> str:
    """Without what HTML makes of white space."""
    return " ".join(text.split())


def _keep(page: Page, folder: Path) -> None:
    picture = page.screenshot(path=folder / "web-page.png")
    if kept := os.environ.get("LLAVA_STEERING_ARTEFACTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        (Path(kept) / "web-page.png").write_bytes(picture)
