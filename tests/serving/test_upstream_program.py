"""Upstream's servers are run with flags of ours beside theirs, and with a log in which all is well unless it is not.

The modules: `serving/upstream_program.py` and `serving/controller.py`. The programs themselves: test_launcher.py.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from llava_steering_plugin.serving import controller, page
from llava_steering_plugin.serving.upstream_program import import_plainly, taken


def test_our_flags_are_taken_out_of_the_words_wherever_they_are() -> None:
    words = ["--host", "x", "--allowed-host", "a", "--port=1", "--allowed-host=b", "--allowed-hosts", "--allowed-host"]
    assert taken(words, "--allowed-host") == (["a", "b", ""], ["--host", "x", "--port=1", "--allowed-hosts"])


def test_the_help_of_the_controller_has_upstreams_flags_and_ours(
    patched_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controller.main(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--port", "--dispatch-method", "--allowed-host"))


def test_upstreams_servers_leave_standard_output_and_error_as_they_are(
    patched_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llava.utils

    monkeypatch.setattr(llava.utils, "handler", logging.NullHandler())  # no log file
    before = sys.stdout, sys.stderr
    import_plainly("llava.serve.controller")
    assert (sys.stdout, sys.stderr) == before


def test_gradios_applications_refuse_other_sites_that_gradio_itself_lets_in(
    patched_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    from gradio import routes
    from starlette.testclient import TestClient

    with gradio.Blocks() as blocks:
        gradio.Textbox()
    foreign = {"Origin": "http://evil.example"}
    original = routes.App.__dict__["create_app"]
    assert TestClient(routes.App.create_app(blocks)).get("/config", headers=foreign).status_code == 200
    try:
        page._for_own_site(routes, ["pages.example"])
        client = TestClient(routes.App.create_app(blocks), "http://127.0.0.1")
    finally:
        routes.App.create_app = original
    assert client.get("/config").status_code == 200
    assert client.get("/config", headers={"Host": "pages.example"}).status_code == 200
    for headers in (foreign, {"Host": "evil.example"}):
        answer = client.get("/config", headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
