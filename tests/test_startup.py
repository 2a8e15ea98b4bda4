"""The start of every command: `--help` loads nothing heavy, and no command sets torch's compiler up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import subprocess_environment

from llava_steering_plugin.cli import app

HEAVY = {"accelerate", "bitsandbytes", "deepspeed", "gradio", "llava", "numpy", "pandas", "torch", "transformers"}
COMMANDS = [(), *((command.name or command.callback.__name__,) for command in app.registered_commands)]


def start(*words: str, folder: Path, llava: Path) -> tuple[str, set[str]]:
    """Run `python -m WORDS`; return its standard output and the names of all modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words],
        cwd=folder,
        env=subprocess_environment(llava),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, set(re.findall(r"^import time:[^|]*\|[^|]*\| +(\S+)$", done.stderr, re.MULTILINE))


def test_the_commands_whose_help_is_looked_at_are_all_there_are() -> None:
    assert {name for words in COMMANDS for name in words} >= {"plan", "chat", "eval", "serve", "patch", "convert"}


@pytest.mark.parametrize(
    "words",
    [
        *(("llava_steering_plugin", *words) for words in COMMANDS),
        ("llava_steering_plugin.launch",),
        ("llava_steering_plugin.serving.worker",),
        ("llava_steering_plugin.serving.page",),
        ("llava_steering_plugin.serving.controller",),
    ],
    ids=" ".join,
)
def test_help_imports_neither_torch_nor_anything_of_llava(
    words: tuple[str, ...], tmp_path: Path, patched_llava: Path
) -> None:
    shown, modules = start(*words, "--help", folder=tmp_path, llava=patched_llava)

    assert "--help" in shown
    assert "llava_steering_plugin" in modules  # what is measured is measured
    assert {name.split(".")[0] for name in modules} & HEAVY == set()


def test_the_help_of_the_page_names_upstreams_flags_and_ours(tmp_path: Path, patched_llava: Path) -> None:
    shown, _ = start("llava_steering_plugin.serving.page", "--help", folder=tmp_path, llava=patched_llava)

    source = (patched_llava / "llava" / "serve" / "gradio_web_server.py").read_text()
    flags = re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)
    assert "--controller-url" in flags
    assert [flag for flag in [*flags, "--log-requests"] if f"  {flag}" not in shown] == []


def test_plan_imports_llavas_training_without_torchs_compiler_and_scikit_learn(
    tmp_path: Path, patched_llava: Path
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))

    shown, modules = start(
        *("llava_steering_plugin", "plan", "--json", "--tuning_mode", "mores", "--bf16", "True"),
        *("--model_name_or_path", str(tmp_path)),
        folder=tmp_path,
        llava=patched_llava,
    )

    assert json.loads(shown)["problems"] == []
    assert {"llava.train.llava_trainer", "bitsandbytes"} <= modules
    assert modules & {"torch._inductor.compile_fx", "sklearn", "scipy.stats"} == set()
