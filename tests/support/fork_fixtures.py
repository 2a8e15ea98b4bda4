"""Servers that fork upstream's programs, one over each copy of llava, for all tests of a session that want them.

And one whose processes import llava, this package and others by themselves, wherever their PYTHONPATH says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks import LIBRARIES, Forks
from training_runs import subprocess_environment


@contextmanager
def forks_over(llava: Path, folder: Path) -> Iterator[Forks]:
    server = Forks(subprocess_environment(llava), folder)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def patched_forks(patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks_over(patched_llava, tmp_path_factory.mktemp("patched-forks")) as server:
        yield server


@pytest.fixture(scope="session")
def pristine_forks(pristine_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks_over(pristine_llava, tmp_path_factory.mktemp("pristine-forks")) as server:
        yield server


@pytest.fixture(scope="session")
def library_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("library-forks")
    server = Forks(subprocess_environment(folder), folder, LIBRARIES)
    try:
        yield server
    finally:
        server.close()
