"""Samples are read one by one, and are those that json.load reads; so are the errors (`planning/data_file.py`)."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.planning import data_file
from llava_steering_plugin.planning.data_file import samples_in


def read(path: Path) -> list[Any]:
    return [sample for sample, _ in samples_in(str(path))]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind > 5:
        return {f"k{number} é🔴": any_value(rng, depth + 1) for number in range(rng.randrange(4))}
    text = "".join(rng.choice('aé"\\\n\t]}[{,:  🔴') for _ in range(rng.randrange(12)))
    return (None, True, rng.randrange(-999, 10**9), rng.random() * 1e5, text)[kind]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_what_is_read_is_what_json_load_reads_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(data_file, "BLOCK", block)
    rng = random.Random(block)
    path = tmp_path / "data.json"
    for number in range(60):
        samples = [any_value(rng) for _ in range(1 + rng.randrange(6))]
        text = json.dumps(samples, indent=rng.choice((None, 1)), ensure_ascii=number % 2 == 0)
        path.write_text(rng.choice(("", " \n")) + text + rng.choice(("", "\n\n")), encoding="utf-8")
        assert read(path) == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2", "[1 2]", "[1,]", "[,]", "[", '[\n{"a": 1},\n {"a" 2}]', '["ab', '["\\x"]', '["\\u12"]', "[tru]"),
        *('[{"a": 1}\n{"a": 2}]', '[1]{"a": 1}', '{"a": 1}\n{"a": 2}\n', "nonsense", "[-]", "{", "[1]\n]"),
        '[{"a": [1, {"b": }]}]',
    ],
)
def test_an_error_is_json_loads_with_its_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:
    monkeypatch.setattr(data_file, "BLOCK", block)
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(expected.value).rpartition(" (char")[0]
    if "Illegal trailing comma" in message:  # Python 3.13 and later name the comma itself
        message = message.partition(" before")[0]
    assert f"the training data in {path} is no JSON: {message}" in str(caught.value)
    assert ("JSON Lines" in str(caught.value)) == ("Extra data" in message)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1}', "holds an object at its top level; LLaVA reads a list of samples"),
        (b"[]", "holds no samples"),
        (b"null", "holds NoneType at its top level"),
        (b"[" * 100_000, "cannot be read: "),
        (b"[" + b"1" * 5000 + b"]", "cannot be read: Exceeds the limit"),
        (b'["\xff\xfe"]', "cannot be read: 'utf-8' codec"),
        ("\ufeff[1]".encode(), "begins with a byte order mark"),
    ],
    ids=["object", "empty", "null", "deep", "long", "bytes", "mark"],
)
def test_what_is_no_list_of_samples_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(DataError, match=f"the training data in {path} cannot be read: "):
            read(path)


def test_samples_before_an_error_are_there_and_an_early_error_does_not_read_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"b" 2}, ' + ", ".join('{"a": "' + "x" * 90 + '"}' for _ in range(200_000)) + "]")
    samples = samples_in(str(path))
    assert next(samples)[0] == {"a": 1}
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1 column 17"):
        next(samples)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20 < path.stat().st_size
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_file_and_the_position_ends_at_its_size(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[" + ",\n".join(json.dumps({"id": number, "a": "é" * 200}) for number in range(60_000)) + "]")
    tracemalloc.start()
    for number, (sample, position) in enumerate(samples_in(str(path))):  # noqa: B007
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == sample["id"] == 59_999 and position == path.stat().st_size
    assert peak < 12 << 20 < path.stat().st_size
