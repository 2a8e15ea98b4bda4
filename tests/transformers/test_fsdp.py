"""FSDP is refused before a trainer is built, whoever asks for it: the arguments, or accelerate's config.

Covers `training/attaching.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_bases import BASES
from ports import free_port
from steering_trainer import trainer_of

from llava_steering_plugin.errors import ArgumentsError

pytest.importorskip("easy_vqa", reason="easy-vqa is missing: scripts/setup.sh --transformers installs it")
REASON = r"FSDP flattens .* use DeepSpeed ZeRO or plain DDP"
CONFIG = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
num_processes: 1
"""
PROGRAM = """
import sys
from pathlib import Path
from steering_trainer import trainer_of
trainer_of(Path(sys.argv[1]), Path(sys.argv[2]), None)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    BASES["Llava"](folder)
    return folder


@pytest.mark.filterwarnings("ignore:Passing `fsdp` as a string is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "asked", [{"fsdp": True}, {"fsdp": "full_shard"}, {"fsdp": True, "fsdp_config": {"version": 1}}], ids=str
)
def test_arguments_that_ask_for_it_are_refused_before_anything_is_written(
    base: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentsError, match=REASON):
        trainer_of(base, tmp_path / "run", None, **asked)
    assert not (tmp_path / "run").exists()


def test_accelerates_environment_that_asks_for_it_is_refused_and_one_that_does_not_is_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    trainer_of(base, tmp_path / "plain", None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ArgumentsError, match=rf"accelerate's config asks for FSDP \(ACCELERATE_USE_FSDP\)\. {REASON}"):
        trainer_of(base, tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_config_of_accelerate_launch_that_asks_for_it_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "fsdp.yaml").write_text(CONFIG)
    (tmp_path / "program.py").write_text(PROGRAM)
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml")),
            *("--main_process_port", str(free_port()), str(tmp_path / "program.py"), str(base), str(tmp_path / "run")),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode
    assert "accelerate's config asks for FSDP" in done.stderr
    assert not (tmp_path / "run").exists()
