"""Headless Chromium. The browser comes from apt (`scripts/setup.sh --browser`).

A test module asks for it with `pytest_plugins = ["browser_fixtures"]`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[dev]")
    with api.sync_playwright() as playwright:
        names = ("chromium-headless-shell", "chromium", "google-chrome")
        installed = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(installed).is_file():
            missing = "there is no Chromium; scripts/setup.sh --browser installs it from apt, as root"
            # A CI in which this test quietly stopped to run would look as green as before.
            pytest.fail(missing, pytrace=False) if os.environ.get("CI") else pytest.skip(missing)
        # root may start Chromium in no other way, and it sees no page but ours.
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield browser
        browser.close()
