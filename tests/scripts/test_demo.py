"""The demo's results are shown in full, and its tunings have folders of their own (`experiments.demo`)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich.console import Console


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    from experiments.demo import report

    kinds = {"all": 0.5, "colour": 0.25, "shape": 0.5, "yes/no": 0.75}
    rows = [
        {"model": name, "camera": camera, "parameters": parameters, "train_seconds": parameters, **kinds}
        for name, camera, parameters in (
            ("base", "clean", None),
            ("base", "shifted", None),
            ("MoReS rank 4, all", "shifted", 4112),
            ("LoRA r=8", "shifted", 81920),
        )
    ]
    results = {"questions": 30, "rows": rows}
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    console.print(report.table(results))
    shown = console.export_text()
    assert "4,112" in shown
    assert "81,920" in shown
    console.print(report.attention({"attention_to_image": {"base": [0.07, 0.5], "lora-r-8": [0.06, 0.471]}}))
    assert "47%" in console.export_text()
    report.plot(results, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400


def test_every_tuning_of_the_demo_has_a_folder_by_whose_name_upstream_loads_it() -> None:
    from experiments.demo.settings import FULL

    names = [tuning.adapter(Path("stage")).name for tuning in FULL.tunings]
    assert len(set(names)) == len(names)
    assert all(name.startswith("llava-v1-") for name in names), "so that upstream takes it for a LLaVA with template v1"
    assert [name for name in names if "lora" in name] == [
        tuning.adapter(Path("stage")).name for tuning in FULL.tunings if tuning.is_lora
    ]
