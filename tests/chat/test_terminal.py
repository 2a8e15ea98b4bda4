"""Tab completes lines of the chat in the terminal. What it prints: test_chat.py."""

from __future__ import annotations

from pathlib import Path


def test_tab_completes_commands_names_and_files(tmp_path: Path) -> None:
    from llava_steering_plugin.chat.terminal import completions

    (tmp_path / "cat.png").touch()
    (tmp_path / "cats").mkdir()
    names = ["__base__", "cats", "pets", "pet shop"]
    assert completions("/ad", names) == ["/adapter"]
    assert completions("/adapter p", names) == ["/adapter pets", "/adapter pet shop"]
    assert completions(f"/image {tmp_path}/ca", names) == [f"/image {tmp_path}/cat.png", f"/image {tmp_path}/cats/"]
    assert completions("What c", names) == completions("", names) == []
