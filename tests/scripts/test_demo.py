"""The demo's results are shown in full (`experiments.demo`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console


def compared(*methods: tuple[str, int, float]) -> dict[str, Any]:
    """Return results.json of a comparison of these: name, trained parameters, percent of right answers."""
    kinds = ("colour", "shape", "yes/no")
    entries = [
        {
            "method": name,
            "frozen": not parameters,
            "rate": 0.01 if parameters else None,
            "seeds": [7],
            "done": [7],
            "costs": {"trained_parameters": parameters},
            "outcomes": {kind: {"score": {"mean": right, "deviation": None}} for kind in kinds},
        }
        for name, parameters, right in methods
    ]
    return {"tasks": [{"task": "shifted camera", "tests": dict.fromkeys(kinds, "exact_match"), "methods": entries}]}


def test_the_tables_and_the_plot_show_every_row(tmp_path: Path) -> None:
    from experiments import comparing
    from experiments.demo import report

    kinds = {"all": 0.5, "colour": 0.25, "shape": 0.5, "yes/no": 0.75}
    rows = [
        {"model": name, "camera": camera, **kinds}
        for name, camera in (("base", "clean"), ("base", "shifted"), ("MoReS rank 4, all", "shifted"))
    ]
    comparison = compared(("base (frozen)", 0, 25.0), ("MoReS rank 4, all", 4112, 97.7), ("LoRA r=8", 81920, 97.0))
    results = {"questions": 30, "rows": rows, "comparison": comparison}
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    console.print(report.table(results))
    console.print(comparing.table_of(comparison))
    shown = console.export_text()
    assert all(word in shown for word in ("clean", "75.0%", "4,112", "81,920", "97.7", "1 of 1"))
    console.print(report.attention({"attention_to_image": {"base": [0.07, 0.5], "lora-r-8": [0.06, 0.471]}}))
    assert "47%" in console.export_text()
    report.plot(results, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400


def test_every_tuning_of_the_demo_has_a_name_of_its_own_and_the_same_budget() -> None:
    from experiments.demo.settings import FULL, QUICK

    assert len({tuning.slug for tuning in FULL.tunings}) == len({tuning.name for tuning in FULL.tunings}) == 5
    assert {len(tuning.rates) for tuning in FULL.tunings} == {2}
    assert set(FULL.diagnosed) < {tuning.slug for tuning in FULL.tunings}
    assert [len(tuning.rates) for tuning in QUICK.tunings] == [1]
