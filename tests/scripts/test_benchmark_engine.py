"""The benchmark of vLLM (`scripts/benchmarks/serving_engine.py`): what it compares, how it judges, and a quick run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quick_runs import SCRIPTS, quick_run
from training_runs import subprocess_environment

SINGLE = {"vLLM, base", "vLLM, base again", "vLLM, 1 of MoReS", "vLLM with slots at all linears, base"}
NAMES = {
    "1": SINGLE | {"vLLM, 1 of PEFT's LoRA", "our worker, 1 of MoReS"},
    "8": SINGLE | {"vLLM, 8 of MoReS", "vLLM, 8 of PEFT's LoRA", "our worker, 8 of MoReS"},
    "32": SINGLE | {"vLLM, 8 of MoReS", "vLLM, 32 of MoReS", "vLLM, 8 of PEFT's LoRA", "our worker, 32 of MoReS"},
}


def rates(mores: float, noise: float = 0.0) -> dict[int, dict[str, list[float]]]:
    """Tokens a second of two rounds, where the base makes 100 and then 200."""
    changed = {"vLLM, base again": 1 + noise, "our worker, 8 of MoReS": 0.25, "vLLM, 8 of PEFT's LoRA": 0.5}
    changed |= {"vLLM, 8 of MoReS": mores, "vLLM with slots at all linears, base": 0.8}
    return {8: {name: [100 * changed.get(name, 1), 200 * changed.get(name, 1)] for name in NAMES["8"]}}


def test_every_variant_is_compared_with_its_own_base_in_the_same_round() -> None:
    from benchmarks.serving_engine import ratios

    assert ratios(rates(0.9))[8] == {
        "vLLM, base again": [1, 1],
        "vLLM, 1 of MoReS": [1, 1],
        "vLLM, 8 of MoReS": [0.9, 0.9],
        "vLLM with slots at all linears, base": [0.8, 0.8],
        "vLLM, 8 of PEFT's LoRA": [0.625, 0.625],
        "our worker, 8 of MoReS": [0.25, 0.25],
    }


@pytest.mark.parametrize(
    ("mores", "noise", "verdict"),
    [(0.96, 0.0, "met"), (0.94, 0.0, "NOT MET"), (0.94, 0.02, "met within the noise"), (0.92, -0.02, "NOT MET")],
)
def test_mores_has_to_keep_95_percent_of_the_base_or_miss_it_by_the_noise_at_most(
    mores: float, noise: float, verdict: str
) -> None:
    from benchmarks.serving_engine import ratios, targets

    judged = targets(ratios(rates(mores, noise)))
    assert {target.what: target.verdict for target in judged} == {
        "8 at once, vLLM, 1 of MoReS": "met",
        "8 at once, vLLM, 8 of MoReS": verdict,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "sglang"], "'sglang' is not measured; vllm is"),
        (["--engine", "vllm", "--clients"], "leave one out"),
        (["--engine", "vllm", "--dtype", "bfloat16"], "all is in float32"),
    ],
)
def test_what_it_does_not_measure_is_refused(words: list[str], said: str) -> None:
    command = [sys.executable, str(SCRIPTS / "benchmarks"), "serving", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_without_an_environment_with_vllm_it_says_how_to_make_one(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "benchmarks"), "serving", "--engine", "vllm"]
    environment = subprocess_environment(tmp_path, {"VENV": str(tmp_path / "venv")})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no {tmp_path}/venv-vllm/bin/python" in done.stdout and "scripts/setup.sh --vllm" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_engine_that_ends_is_told_with_its_last_lines(tmp_path: Path) -> None:
    from benchmarks.serving_engine_parts import running_engines

    with pytest.raises(SystemExit, match=r"has ended with 1; its last lines:\n(.*\n)*.*vllm"):
        # This interpreter has no vLLM.
        with running_engines(Path(sys.executable), {}, 1, tmp_path):
            pass


@pytest.mark.slow
def test_a_quick_run_measures_every_variant_beside_its_base(tmp_path: Path) -> None:
    from benchmarks.serving_engine_parts import vllms_python

    if not vllms_python().is_file():
        pytest.skip(f"needs vLLM, and there is no {vllms_python()}: scripts/setup.sh --vllm makes it")
    written = quick_run("serving", tmp_path, "--engine", "vllm")
    assert {"vllm", "vllm's torch", "shape"} <= written["machine"].keys()
    found = written["results"]
    assert found.keys() == NAMES.keys()
    for at_once, of in found.items():
        assert of["tokens a second"].keys() == NAMES[at_once]
        assert of["ratios"].keys() == NAMES[at_once] - {"vLLM, base"}
        values = [*of["tokens a second"].values(), *of["ratios"].values()]
        assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in values)
    assert written["targets"] == []
