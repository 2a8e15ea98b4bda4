"""The names that the web page shows: upstream's own page picks the adapter's conversation template from them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_steering_plugin.errors import AdapterError, ArgumentsError, SteeringError
from llava_steering_plugin.inference.sources import (
    PAGE_PREFIXES,
    component_templates,
    label_of,
    locate_all,
    read_sources,
    shown_name,
    template_on_page,
)
from llava_steering_plugin.serving.page import pick_templates

MISLEADING = ("cats", "llava-v1.6-34b-mistral", "my-mpt", "mixlora-llama-2", "plain", "mmtag-orca-hermes", "2cats")


class _NoWorker(BaseHTTPRequestHandler):
    """What the controller says when no worker has a model: the page has picked its template by then."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"address": ""}')

    def log_message(self, *args: Any) -> None:
        """Not into the output of the tests."""


@pytest.fixture(scope="module")
def pages_template(
    patched_llava: Path,
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """The template that upstream's page picks for a model, as it begins a conversation."""
    import contextlib
    import sys

    import llava.utils

    llava.utils.handler = llava.utils.handler or logging.NullHandler()  # no log file in the current folder
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        from llava.serve import gradio_web_server as page
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NoWorker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = getattr(page, "args", None)
    page.args = SimpleNamespace(controller_url=f"http://127.0.0.1:{server.server_port}")
    request = SimpleNamespace(client=SimpleNamespace(host="here"))

    def pick(model: str) -> dict[str, Any]:
        state = page.default_conversation.copy()
        state.append_message(state.roles[0], "Hello")
        state.append_message(state.roles[1], None)
        state.skip_next = False
        [(begun, *_)] = page.http_bot(state, model, 0.0, 1.0, 8, request)
        return _template(begun)

    yield pick
    page.args = before
    server.shutdown()
    server.server_close()


def _template(conversation: Any) -> dict[str, Any]:
    fields = ("system", "roles", "offset", "sep_style", "sep", "sep2", "version")
    return {field: getattr(conversation, field) for field in fields}


def test_the_page_picks_each_adapters_own_template_whatever_the_adapter_is_called(
    pages_template: Callable[[str], dict[str, Any]],
) -> None:
    from llava.conversation import conv_templates

    picked = {
        (conversation, name): pages_template(shown_name(name, conversation, "llava-v1.5-7b"))
        for conversation in PAGE_PREFIXES
        for name in MISLEADING
    }
    assert picked == {(conversation, name): _template(conv_templates[conversation]) for conversation, name in picked}


def test_the_rules_of_the_page_are_known(pages_template: Callable[[str], dict[str, Any]]) -> None:
    from llava.conversation import conv_templates

    bases = ["llava-v1.5-7b", "LLaVA-v1.6-34b", "llava-llama-2-13b", "llava-plain", "llava-v1-plain-finetune", "vicuna"]
    bases += ["llava-v1.6-mistral-7b", "llava-mixtral-hermes", "llava-v1-plain", "llava-mpt", "mpt-llava-v1", "llama-2"]
    for name in (*bases, *MISLEADING):
        if (template := template_on_page(name)) in conv_templates:
            assert _template(conv_templates[template]) == pages_template(name), name


def test_our_page_takes_a_components_template_from_what_stands_before_the_colon(
    pages_template: Callable[[str], dict[str, Any]],
) -> None:
    from llava.conversation import conv_templates
    from llava.serve import gradio_web_server as page

    before = page.conv_templates, page.http_bot
    usual = {base: pages_template(base) for base in ("llava-v1.5-7b", "vicuna-7b", "phi--cats")}
    pick_templates(page)
    try:
        assert {"phi", "qwen2_5", "smollm2"} <= component_templates()
        for conversation in component_templates():
            for name in MISLEADING:
                shown = shown_name(name, conversation, "llava-v1.5-7b")
                assert pages_template(shown) == _template(conv_templates[conversation])
        assert {base: pages_template(base) for base in usual} == usual
    finally:
        page.conv_templates, page.http_bot = before


@pytest.mark.parametrize("base", ["llava-v1.5-7b", "llava-v1.6-34b", "vicuna-7b", "llava-llama-2-13b-chat", "llava"])
def test_an_adapter_that_records_no_template_is_prompted_like_its_base(
    pages_template: Callable[[str], dict[str, Any]], base: str
) -> None:
    for name in MISLEADING:
        assert pages_template(shown_name(name, None, base)) == pages_template(base)


def test_a_template_that_the_page_cannot_pick_is_refused_with_the_reason() -> None:
    for conversation in ("plain", "v0", "v0_plain", "default", "qwen_2"):
        with pytest.raises(AdapterError, match=f"'{conversation}', which LLaVA's web page cannot pick"):
            shown_name("cats", conversation, "llava")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a b", "-x", "a\nb", "ä", "x" * 101, "a\0"])
def test_what_could_be_a_path_or_a_flag_is_no_name(name: str) -> None:
    with pytest.raises(ArgumentsError, match="cannot be the name"):
        shown = read_sources([f"{name}=somewhere"])
        assert not shown


def test_names_come_from_folders_from_hub_ids_and_from_the_command_line(tmp_path: Path) -> None:
    for folder in ("cats", "run/checkpoint-7", "a=b"):
        (tmp_path / folder).mkdir(parents=True)
    given = [str(tmp_path / "cats"), f"{tmp_path}/run/checkpoint-7", "owner/dogs", f"mine={tmp_path}/cats"]
    assert read_sources(given) == {
        "cats": str(tmp_path / "cats"),
        "run_checkpoint-7": str(tmp_path / "run" / "checkpoint-7"),
        "dogs": "owner/dogs",
        "mine": str(tmp_path / "cats"),
    }
    assert label_of("owner/checkpoint-7") == "owner_checkpoint-7"


def test_two_adapters_of_one_name_are_refused_together_with_everything_else_that_is_wrong(tmp_path: Path) -> None:
    for folder in ("a/cats", "b/cats", "b/two words"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ArgumentsError) as refused:
        read_sources([f"{tmp_path}/a/cats", f"{tmp_path}/b/cats", f"{tmp_path}/b/two words"])
    assert "a/cats and" in str(refused.value) and "'two words' cannot be" in str(refused.value)


@pytest.mark.parametrize("word", ["x" * 300, "pets=" + "x" * 300, "y/" * 2100 + "pets"])
def test_a_path_that_no_file_system_takes_is_a_message_and_no_traceback(word: str) -> None:
    with pytest.raises(SteeringError, match=r"is no folder|cannot be the name"):
        locate_all(read_sources([word]))
