"""Files of strangers: what is no regular file, or too large, is refused at once; nothing else opens such files."""

from __future__ import annotations

import ast
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llava_steering_plugin
from llava_steering_plugin import foreign_files as files
from llava_steering_plugin.foreign_files import (
    UnusableFile,
    irregular,
    parse_json,
    pinned,
    read_bytes,
    read_json,
)

PACKAGE = Path(llava_steering_plugin.__file__).parent


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path, which sockets need."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # without a block on the disk


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (a_pipe, "it is a named pipe and no regular file"),
    "socket": (a_socket, "it is a socket"),
    "device": (a_link_to_a_device, "it is a device"),
    "link to a pipe": (a_link_to_a_pipe, "it is a named pipe"),
    "sparse": (too_large, "it has 1,099,511,627,776 bytes, and a file of its kind at most 1,048,576"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_regular_file_or_too_large_is_refused_without_waiting(place: Path, kind: str) -> None:
    make, expected = UNUSABLE[kind]
    make(place / "config.json")
    for read in (read_bytes, read_json):
        with pytest.raises(UnusableFile, match=expected):
            read(place / "config.json")


def test_a_file_that_turns_into_a_pipe_between_two_calls_is_refused_without_waiting(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place / "config.json"
    path.write_text("{}")
    regular = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(files.os, "stat", lambda path: regular)
    with pytest.raises(UnusableFile, match="named pipe"):
        read_bytes(path)


def test_a_file_that_grows_while_it_is_read_is_read_to_its_limit_and_no_further(place: Path) -> None:
    path = place / "config.json"
    path.write_bytes(b" " * 1000)
    first, second = threading.Event(), threading.Event()
    original = os.read

    def slow(handle: int, count: int) -> bytes:
        first.set()
        assert second.wait(10)
        return original(handle, count)

    def grow() -> None:
        assert first.wait(10)
        with path.open("ab") as file:
            file.write(b" " * 1000)
        second.set()

    writer = threading.Thread(target=grow)
    writer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "read", slow)
        with pytest.raises(UnusableFile, match="more than 1,500 bytes"):
            read_bytes(path, 1500)
    writer.join()
    assert len(read_bytes(path, 2000)) == 2000


def test_links_to_files_are_followed_as_the_hub_makes_them(place: Path) -> None:
    (place / "blob").write_text('{"a": [1, 2]}')
    (place / "config.json").symlink_to("blob")
    assert read_json(place / "config.json") == {"a": [1, 2]}
    assert irregular(place) == []


def test_folders_missing_files_and_links_in_a_circle_are_told_apart(place: Path) -> None:
    (place / "folder.json").mkdir()
    (place / "circle").symlink_to("circle")
    for name, kind in {"folder.json": IsADirectoryError, "missing": FileNotFoundError, "circle": OSError}.items():
        with pytest.raises(kind):
            read_bytes(place / name)
    assert not files.readable(place / "folder.json", 10) and not files.readable(place / "missing", 10)


def test_a_program_is_given_the_file_that_was_opened_whatever_takes_its_name(place: Path) -> None:
    path = place / "model.bin"
    path.write_text("the right one")
    with pinned(path) as name:
        path.unlink()
        os.mkfifo(path)
        assert Path(name).read_text() == "the right one"
    assert irregular(place) == ["model.bin"]


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "deep": ("[" * 100_000, "deep"),
        "deep but closed": ("[" * 500 + "]" * 500, "deep"),
        "tables in tables": ('{"a":' * 70 + "1" + "}" * 70, "deep"),
        "a long number": ("9" * 5000, "digits"),
        "many values": ("[" + "[]," * 400_000 + "1]", "more than 300,000 values"),
        "no JSON": ("{", "Expecting"),
    }.values(),
    ids=str,
)  # fmt: skip
def test_too_much_of_json_is_one_kind_of_error(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_json(text)
    assert parse_json('{"a": ' + "[" * 20 + "]" * 20 + "}")


# Who opens what, beside the helper: programs' own files, which no adapter, base or checkpoint of a stranger's is.
OTHERS = {
    "checkout",  # LLaVA's source
    "launch.py",
    "upstream/source.py",
    "upstream/train/samples.py",  # the data of this very training
    "upstream/text/picture_tokens.py",  # its pictures
    "serving/upstream_program.py",
    "serving/http",  # bodies of requests, limited there
    "serving/generation",  # images of requests, whose bytes are in memory
    "serving/page.py",
    "cli",  # answers that are written
    "foreign_files.py",
    "adapters/stored/writing.py",  # writes
    "whole_files.py",  # writes
    "training",  # what this very training has written, and its flags' files
    "inference/asking/questions.py",  # the user's questions and images
    "inference/asking/answers_file.py",  # answers that are written, and read again
    "inference/images.py",
    "evaluation",
    "diagnostics",
    "planning",
    "comparison",  # the user's file, and what its programs have written
}
OPENERS = {
    "open", "read_text", "read_bytes", "safe_open", "load_file", "get_config_dict", "memmap",
}  # fmt: skip


def opens(file: Path) -> list[str]:
    """The calls in a file that open another one by its name, but for names that `pinned` has given."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
        loads = name == "load" and owner in ("torch", "json", "pickle")
        safe = bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id.startswith("pinned")
        ours = name.startswith("read_") and isinstance(function, ast.Name)
        if (name in OPENERS or loads) and not safe and not ours:
            found.append(f"{file.relative_to(PACKAGE)}:{node.lineno} {name}")
    return sorted(found)


def test_nothing_that_reads_adapters_bases_or_checkpoints_opens_a_file_by_itself() -> None:
    """Use `foreign_files.read_json`, `opened`, or `pinned` for libraries that want a name."""
    looked_at = [
        file
        for file in sorted(PACKAGE.rglob("*.py"))
        if not any(str(file.relative_to(PACKAGE)).startswith(other) for other in OTHERS)
    ]
    assert len(looked_at) > 60
    assert [call for file in looked_at for call in opens(file)] == []


def test_the_guard_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text(
        "json.loads(path.read_text())\nopen(path)\ntorch.load(path)\nsafe_open(pinned_path, 'pt')\nsafe_open(path)\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert opens(tmp_path / "bad.py") == [
        "bad.py:1 read_text", "bad.py:2 open", "bad.py:3 load", "bad.py:5 safe_open",
    ]  # fmt: skip
