"""A report in headless Chromium without a network: every figure is drawn, on light and dark pages and on a phone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reports import interference_of, modality_of, reported, write_result

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["browser_fixtures"]
pytestmark = pytest.mark.slow

DRAWN = ".scatterlayer .points path, .scatterlayer .js-line, .heatmaplayer image"  # marks, a line, or a map


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    ratios = {"base": [0.25, 0.5, 0.4], "<b>mores</b>": [0.5, 1.5, None], "a-long-name" * 8: [0.1, 0.2, 0.3]}
    write_result(folder / "modality.json", modality_of(ratios))
    matrix = [[1.0, -0.4], [0.1, 1.0]]
    write_result(folder / "interference.json", interference_of(["vqa", "a-long-task-name" * 3], {"mixlora": matrix}))
    log = [{"step": step, "loss": 1 / step} for step in range(1, 100)]
    write_result(folder / "trainer_state.json", {"log_history": log, "global_step": 99})
    reported(folder / "report.html", folder)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_readable_without_a_network(browser: Browser, page_file: Path, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, offline=True, viewport={"width": 1200, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    figures = page.locator("figure .js-plotly-plot")
    assert figures.count() == page.locator("figure").count() == 13
    assert figures.evaluate_all(f"plots => plots.every(plot => plot.querySelector('{DRAWN}'))")
    widths = figures.evaluate_all("plots => plots.map(plot => plot._fullLayout.width - plot.parentNode.clientWidth)")
    assert max(map(abs, widths)) <= 1
    ink = page.evaluate("() => getComputedStyle(document.body).color")
    assert ink == ("rgb(31, 35, 40)" if scheme == "light" else "rgb(230, 232, 235)")
    texts = page.locator(".xtick text, .ytick text, .legendtext, .xtitle, .ytitle, .colorbar text")
    assert set(texts.evaluate_all("texts => texts.map(text => getComputedStyle(text).fill)")) == {ink}

    places = page.locator("#figure-1 .nsewdrag")
    places.hover()
    page.locator("#figure-1 .hoverlayer .legend").wait_for()
    assert "<b>mores</b> : 1.5" in (page.locator("#figure-1 .hoverlayer").text_content() or "")
    buttons = page.locator("#figure-1 .modebar-btn").evaluate_all("all => all.map(each => each.dataset.title)")
    assert buttons and not [title for title in buttons if "share" in title.lower() or "cloud" in title.lower()]
    _keep(page, f"report-{scheme}.png")

    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function(
        "() => [...document.querySelectorAll('figure .js-plotly-plot')].every(plot => plot._fullLayout.width <= 400)"
    )
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
    assert complaints == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    context.close()


def _keep(page: object, name: str) -> None:
    if kept := os.environ.get("LLAVA_STEERING_ARTEFACTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(kept) / name, full_page=True)  # type: ignore[attr-defined]
