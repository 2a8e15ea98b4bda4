"""The demo, the multi-task measurement and the ratios with --quick: every part of them, and a second run.

Covers the pipelines, `base`, `backbone`, `commands`, `comparing`, `program` and `tuning` of `experiments`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quick_runs import SCRIPTS


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What they share: the measurement goes on from the demo's base."""
    return tmp_path_factory.mktemp("demo-output")


@pytest.mark.slow
def test_the_quick_demo_runs_every_part_and_a_second_run_uses_what_is_there(output: Path) -> None:
    command = [str(SCRIPTS / "demo.sh"), "--quick", "--output", str(output)]
    with_vllm = Path(f"{sys.prefix}-vllm").exists()
    subprocess.run([*command, *(["--vllm"] if with_vllm else [])], check=True, timeout=1500)
    results = json.loads((output / "quick" / "results.json").read_text())
    if with_vllm:
        assert results["engines"]["vllm"]["equal"] == 2 * 30  # the base's and the adapter's texts to every question
    base, shifted, mores = results["rows"]
    assert (base["camera"], shifted["camera"], mores["camera"]) == ("clean", "shifted", "shifted")
    (task,) = results["comparison"]["tasks"]
    frozen, tuned = task["methods"]
    assert (frozen["frozen"], tuned["method"]) == (True, mores["model"])
    assert tuned["costs"]["trained_parameters"] == 4 * (2 * 128 * 4 + 4)
    assert (output / "quick" / "compare" / "results.md").is_file()
    assert all(0 <= row[kind] <= 1 for row in results["rows"] for kind in ("colour", "shape", "yes/no"))
    assert results["chat"]["question"] == "what color is the shape?"
    assert (output / "quick" / "results.png").is_file()
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert again.stdout.count("done before") == len(results["seconds"]) - 3 * with_vllm  # not asked for again


@pytest.mark.slow
def test_the_quick_measurement_runs_every_part_and_a_second_run_uses_what_is_there(output: Path) -> None:
    command = [str(SCRIPTS / "multitask.sh"), "--quick", "--output", str(output)]
    subprocess.run(command, check=True, timeout=1500)
    found = output / "quick" / "multitask"
    results = json.loads((found / "results.json").read_text())
    (task,) = results["comparison"]["tasks"]
    base, small, large, frozen, *learning = task["methods"]
    assert base["frozen"] and list(task["tests"])[1:] == [
        "colour a",
        "colour b",
        "colour c",
        "shape",
        "yes/no",
        "digit",
    ]
    trained = {one["method"]: one["costs"]["trained_parameters"] for one in (small, large, frozen, *learning)}
    assert (trained[small["method"]], trained[frozen["method"]]) == (4 * 2944 * 2, 4 * 2944 * 8)
    for one in learning:
        assert abs(trained[large["method"]] - trained[one["method"]]) < 0.02 * trained[one["method"]]
    assert [entry["method"] for entry in results["information"]] == [one["method"] for one in (frozen, *learning)]
    for entry in results["information"]:
        assert 0 <= entry["information"]["cameras"]["told"]["mean"] <= 1
        assert len(entry["information"]["tasks"]["layers"]) == 4
    assert all(one["done"] == [1] for one in task["methods"])
    assert (found / "compare" / "results.md").is_file()
    assert (found / "multitask.png").is_file()
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    stages = [line for line in again.stdout.splitlines() if line.startswith("multitask/")]
    assert len(stages) == len(results["seconds"])
    assert all("done before" in line for line in stages)


@pytest.mark.slow
def test_the_quick_comparison_of_ratios_runs_every_part_and_a_second_run_uses_what_is_there(output: Path) -> None:
    command = [str(SCRIPTS / "ratios.sh"), "--quick", "--output", str(output)]
    subprocess.run(command, check=True, timeout=1500)
    found = output / "quick" / "ratios"
    fixed, choice = json.loads((found / "results.json").read_text())["rows"]
    assert (fixed["tokens"], choice["tokens"]) == ("1%", "1%,5%,20%,all")
    assert choice["parameters"] == fixed["parameters"] + 4 * 4
    assert fixed["chosen"] == ["1%"] * 4 and set(choice["chosen"]) <= {"1%", "5%", "20%", "all"}
    assert (found / "results.md").read_text().count("\n") == 4
    cells = (found / "compare" / "results.jsonl").read_bytes()
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    stages = [line for line in again.stdout.splitlines() if line.startswith("ratios/")]
    assert stages and all("done before" in line for line in stages)
    assert (found / "compare" / "results.jsonl").read_bytes() == cells
