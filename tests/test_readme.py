"""The commands and snippets of the README, and of the pages behind it, work as they stand there.

They run in a folder laid out as the pages assume. docs/python-api.md has a test of its own, test_python_api.py; links
and files are checked by test_links.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinyLlava
from training_runs import subprocess_environment, train_flags, train_in_process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = (README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "chat-and-eval", "differences")))
COMMANDS = list(
    dict.fromkeys(
        line.split("  #")[0].strip()
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in re.sub(r"\\\n +", "", block).splitlines()
        if line.strip()
    )
)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# Beginnings of commands that are not run by this test, and why.
NOT_RUN_HERE = {
    "scripts/demo.sh": "tests/scripts/test_demo.py runs it",
    "scripts/test.sh": "this test is a part of it",
    "pip install": "scripts/setup.sh does it",
    "deepspeed": "train_mem.py asks for flash attention, which has no CPU version; see tests/test_launched_programs.py",
    "python -m llava.serve.model_worker": "tests/upstream/test_model_worker.py runs it, with its controller",
    "python -m llava.eval.": "it asks for CUDA; run below through launch --cpu",
    "python -m llava_steering_plugin.launch llava.train.train_mem": "as above, tests/test_launched_programs.py",
    "python -m llava_steering_plugin.launch --same-order": "as above, and tests/training/test_same_order.py",
    "llava-steering serve": "tests/serving/test_launcher.py starts it, and stops it",
    "llava-steering convert": "tests/convert/test_convert_command.py runs it on the authors' layouts",
}


@pytest.fixture(scope="module")
def workplace(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's examples name."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny.llava, folder / "checkpoints" / "my-base")
    shutil.copytree(tiny.images, folder / "images")
    shutil.copy(tiny.data, folder / "train.json")
    shutil.copy(next(tiny.images.glob("*.png")), folder / "cat.jpg")
    first = tiny.questions.read_text().splitlines()[0]
    (folder / "q.jsonl").write_text(first + "\n")
    shutil.copytree(patched_llava / "llava", folder / "checkout" / "llava")
    mode = {"tuning_mode": "mores", "freeze_mm_mlp_adapter": True, "max_steps": 1}
    train_in_process(train_flags(tiny, folder / "checkpoints" / "my-adapter", mode))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(tuple(NOT_RUN_HERE))])
def test_a_command_works(command: str, workplace: Path) -> None:
    words = shlex.split(command)
    program = {"python": [sys.executable], "llava-steering": [sys.executable, "-m", "llava_steering_plugin"]}[words[0]]
    # The one thing to add on a machine without a GPU; LLaVA's chat has its own flag for it.
    device = ["--device", "cpu"] if "llava.serve.cli" in words else []
    done = subprocess.run(
        [*program, *words[1:], *device],
        cwd=workplace,
        env=subprocess_environment(workplace / "checkout"),
        input="What color is this?\n\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "llava.serve.cli" in words:
        assert len(done.stdout.partition("ASSISTANT: ")[2].partition("USER: ")[0].strip()) > 0
    if "llava.eval.model_vqa_loader" in words:
        assert json.loads((workplace / "answers" / "a.jsonl").read_text())["text"]


def test_the_python_snippet_of_the_readme_works(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (snippet,) = SNIPPETS
    space: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), space)
    assert type(space["model"]).__name__ == "LlavaLlamaForCausalLM"
    assert "llava_steering" not in space["model"].__dict__, "the last line takes the adapter off"


def test_no_command_is_excused_that_the_pages_do_not_have() -> None:
    assert not [start for start in NOT_RUN_HERE if not any(command.startswith(start) for command in COMMANDS)]


def test_every_test_that_an_excuse_names_is_there() -> None:
    named = [name for reason in NOT_RUN_HERE.values() for name in re.findall(r"tests/[\w/]+\.py", reason)]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
