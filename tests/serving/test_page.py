"""The options of the web page. The page itself, in a browser: test_browser.py."""

from __future__ import annotations

import re
from pathlib import Path

from llava_steering_plugin.serving import page


def test_the_page_has_the_options_of_upstreams_and_one_of_its_own(patched_llava: Path) -> None:
    source = (patched_llava / "llava" / "serve" / "gradio_web_server.py").read_text()
    shown = page.help_parser().format_help()
    expected = {*re.findall(r'add_argument\(\s*"(--[\w-]+)"', source), "--help", "--log-requests", "--allowed-host"}
    assert set(re.findall(r"--[\w-]+", shown)) == expected
    assert "--controller-url" in shown and "default: 127.0.0.1" in shown
