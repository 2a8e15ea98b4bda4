"""docs/python-api.md: its examples run, as one session and for real, and it names all that the package exports."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinyLlava

import llava_steering_plugin

PAGE = (Path(__file__).parents[1] / "docs" / "python-api.md").read_text(encoding="utf-8")
SESSION = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
GIVEN = re.compile(r"^(?P<expression>[^#\n]+?)  # -> (?P<value>.+)$", re.MULTILINE)


@pytest.fixture
def workplace(tiny: TinyLlava, patched_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the page assumes, with an adapter of MoReS as the training of one step would save it."""
    from steered import load_llava, strengthen

    from llava_steering_plugin import attach, save_adapter

    shutil.copytree(tiny.llava, tmp_path / "checkpoints" / "my-base")
    shutil.copy(next(tiny.images.glob("*.png")), tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    base = load_llava(tmp_path / "checkpoints" / "my-base")
    strengthen(attach(base, "mores"))
    save_adapter(base, tmp_path / "checkpoints" / "my-adapter")
    return tmp_path


def checked(session: str) -> str:
    """The session with every `EXPRESSION  # -> VALUE` made into a check of it."""
    return GIVEN.sub(lambda line: f"check({line['expression']!r}, {line['expression']}, {line['value']!r})", session)


def test_the_page_runs_from_top_to_bottom_and_gives_what_it_says(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []

    def check(expression: str, value: object, expected: str) -> None:
        assert str(value) == expected, expression
        given.append(expression)

    space: dict[str, Any] = {"check": check}
    exec(compile(checked(SESSION), "docs/python-api.md", "exec"), space)
    assert len(given) == PAGE.count("# -> ") > 0
    for answer in ("answer", "base_answer", "answers"):
        assert space[answer].shape[1] > 1, answer
    assert len(space["answers"]) == 3
    assert (workplace / "checkpoints" / "a-copy" / "adapter_model.safetensors").read_bytes()
    moved = space["load_adapter"](space["model"], workplace / "checkpoints" / "mine").parameters()
    assert any(value.abs().sum() > 0 for name, value in moved.items() if name.endswith("steer_shift")), "it trained"
    printed = capsys.readouterr().out
    assert "mores_rank is 0" in printed and "mores_tokens: 'f0'" in printed, "all problems in one error"
    assert "nowhere" in printed


def test_the_page_lists_the_names_that_the_package_exports_and_no_others() -> None:
    tables = PAGE.partition("## Errors")[2]
    first_columns = " ".join(re.findall(r"^\| (`.*?) \|", tables, re.MULTILINE))
    named = re.findall(r"`(\w+)(?:\([^`]*\))?`", first_columns) + re.findall(r"also called `(\w+)`", tables)
    assert sorted(named) == sorted(llava_steering_plugin.__all__)


def test_every_import_of_the_page_is_of_a_public_name() -> None:
    imports = [node for node in ast.walk(ast.parse(SESSION)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("llava_steering_plugin")]
    assert {node.module for node in ours} == {"llava_steering_plugin"}
    assert {alias.name for node in ours for alias in node.names} <= set(llava_steering_plugin.__all__)
