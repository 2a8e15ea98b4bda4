"""What is put into a worker's watched folder, replaced in it and taken out is served, and no longer."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_files import set_header
from changing_fixtures import listed
from serving_fixtures import Alone, Client, Question, wait_until

from llava_steering_plugin.serving.controller_link import ControllerLink
from llava_steering_plugin.serving.folder_watch import WatchedFolder

pytest_plugins = ["serving_fixtures", "changing_fixtures"]


def test_what_is_put_into_the_watched_folder_replaced_in_it_and_taken_out_is_followed(
    worker: Any,
    client: Client,
    controller_link: ControllerLink,
    controller: str,
    shelf: Path,
    folder: Path,
    shown: set[str],
    alone: Alone,
    asked: list[Question],
) -> None:
    watched = WatchedFolder(folder, worker.catalog, controller_link.changed, every=0.1)
    watched.start()
    try:
        shutil.copytree(shelf / "cats", folder / "new")
        (folder / ".hidden").mkdir()
        (folder / "no-adapter").mkdir()
        wait_until(lambda: listed(controller) == shown | {"new"})
        assert client.answer("new", asked[0]) == alone("cats", asked[0])

        replacement = folder / "new" / "coming.partial"
        shutil.copy(shelf / "dogs" / "adapter_model.safetensors", replacement)
        replacement.replace(folder / "new" / "adapter_model.safetensors")
        wait_until(lambda: client.answer("new", asked[0]) == alone("dogs", asked[0]))

        (folder / "new" / "adapter_model.safetensors").write_bytes(b"broken")
        wait_until(lambda: "new" in worker.catalog.rejected)
        assert client.answer("new", asked[0]) == alone("dogs", asked[0]), "the last good one goes on"

        shutil.rmtree(folder / "new")
        wait_until(lambda: listed(controller) == shown)
        assert "new" not in worker.catalog.rejected
    finally:
        watched.stop()
        watched.join(30)


def test_the_folder_neither_replaces_nor_removes_an_adapter_that_came_from_elsewhere(
    worker: Any, client: Client, shelf: Path, folder: Path, shown: set[str], alone: Alone, asked: list[Question],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shutil.copytree(shelf / "dogs", folder / "cats")
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    assert not watched.look(settled=True)
    assert f"{folder / 'cats'} is not served: 'cats' is {shelf / 'cats'} already" in caplog.text
    shutil.rmtree(folder / "cats")
    assert not watched.look(settled=True)
    assert client.answer("cats", asked[0]) == alone("cats", asked[0])


def test_a_folder_whose_name_was_taken_is_served_when_that_adapter_has_gone_and_is_complained_of_once(
    worker: Any, client: Client, shelf: Path, folder: Path, shown: set[str], alone: Alone, asked: list[Question],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shutil.copytree(shelf / "dogs", folder / "cats")
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    for _ in range(4):
        assert not watched.look()
    assert caplog.text.count("is not served") == 1
    assert "already" in worker.catalog.rejected["cats"]
    worker.catalog.drop("cats")
    assert watched.look()
    assert client.answer("cats", asked[0]) == alone("dogs", asked[0])
    assert "cats" not in worker.catalog.rejected
    shutil.rmtree(folder / "cats")
    assert watched.look()


def test_a_folder_whose_name_on_the_page_was_taken_is_served_when_that_is_free(
    worker: Any, client: Client, shelf: Path, folder: Path, shown: set[str], alone: Alone, asked: list[Question],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shutil.copytree(shelf / "dogs", folder / "mixl.ora-x")
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    for _ in range(4):
        assert not watched.look()
    assert "the name of the adapter 'mixlora-x'" in worker.catalog.rejected["mixl.ora-x"]
    worker.catalog.drop("fish")  # nothing to do with it
    assert not watched.look() and caplog.text.count("is not served") == 1
    worker.catalog.drop("mixlora-x")
    assert watched.look() and not worker.catalog.rejected
    assert client.answer("mixl.ora-x", asked[0]) == alone("dogs", asked[0])


def test_a_folder_that_is_a_link_is_followed_whoever_named_its_adapters(
    worker: Any, shelf: Path, folder: Path, shown: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    (folder.parent / "link").symlink_to(folder)
    shutil.copytree(shelf / "cats", folder / "new")
    worker.catalog.put("new", str((folder / "new").resolve()))  # as an administrator names it
    watched = WatchedFolder(folder.parent / "link", worker.catalog, lambda: None)
    watched.look(settled=True)
    assert "not served" not in caplog.text
    shutil.rmtree(folder / "new")
    assert watched.look()
    assert "new" not in {adapter.name for adapter in worker.catalog.adapters()}


def test_folders_that_cannot_be_served_are_listed_with_the_reason_until_they_go_whatever_they_are_called(
    admin: Client, worker: Any, shelf: Path, folder: Path, shown: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [folder / "a bad name", Path(os.fsdecode(os.fsencode(folder) + b"/\xff")), folder / "odd"]
    for path in bad:
        shutil.copytree(shelf / "cats", path)
    set_header(folder / "odd", llava_config="5")
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    for _ in range(3):
        assert not watched.look()
    assert caplog.text.count("is not served") == 3
    assert caplog.text.encode(), "no log could be written"
    rejected = admin.admin("GET").json()["rejected"]
    assert set(rejected) == {"a bad name", "\\udcff", "odd"}
    assert "cannot be the name" in rejected["a bad name"] and "it holds no settings" in rejected["odd"]
    for path in bad:
        shutil.rmtree(path)
    watched.look()
    assert not worker.catalog.rejected


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_an_adapter_that_cannot_be_looked_at_goes_on_serving_and_that_is_said_once(
    worker: Any, shelf: Path, folder: Path, shown: set[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, number: int,
) -> None:  # fmt: skip
    shutil.copytree(shelf / "cats", folder / "new")
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    assert watched.look(settled=True)
    stat, away = Path.stat, [folder / "new" / "adapter_model.safetensors"]

    def fail(path: Path, **options: Any) -> os.stat_result:
        if path in away:
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    for _ in range(3):
        assert not watched.look()
    assert "new" in {adapter.name for adapter in worker.catalog.adapters()}
    assert caplog.text.count(os.strerror(number)) == 1
    away.clear()
    assert not any(watched.look() for _ in range(3)), "it had not changed"
    shutil.rmtree(folder / "new")
    assert watched.look()
    assert "new" not in {adapter.name for adapter in worker.catalog.adapters()}


def test_a_folder_that_cannot_be_read_is_complained_of_when_the_reason_changes(
    worker: Any, shelf: Path, folder: Path, shown: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shelf / "cats", folder / "new")
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    watched.look(settled=True)
    for times in (1, 2):
        folder.rename(folder.parent / "away")
        assert not any(watched.look() for _ in range(4))
        assert caplog.text.count("cannot be read") == 2 * times - 1
        folder.write_text("no folder")
        assert not any(watched.look() for _ in range(4))
        assert caplog.text.count("cannot be read") == 2 * times
        folder.unlink()
        (folder.parent / "away").rename(folder)
        assert not watched.look()
    assert "new" in {adapter.name for adapter in worker.catalog.adapters()}


def test_a_file_that_is_still_being_copied_is_not_read(worker: Any, shelf: Path, folder: Path, shown: set[str]) -> None:
    changes: list[None] = []
    watched = WatchedFolder(folder, worker.catalog, lambda: changes.append(None))
    weights = (shelf / "cats" / "adapter_model.safetensors").read_bytes()
    (folder / "new").mkdir()
    for end in (100, 5000, len(weights)):
        (folder / "new" / "adapter_model.safetensors").write_bytes(weights[:end])
        assert not watched.look()
    assert watched.look() and not watched.look()
    assert changes == [None] and not worker.catalog.rejected


def test_pipes_devices_and_files_without_end_are_refused_and_the_other_adapters_are_followed(
    worker: Any, client: Client, shelf: Path, folder: Path, shown: set[str], alone: Alone, asked: list[Question],
) -> None:  # fmt: skip
    weights, config = "adapter_model.safetensors", "llava_steering_config.json"
    os.mkfifo(folder / "a-pipe-for-a-folder")
    for number, name in enumerate((weights, config, weights, config, weights, config)):
        bad = Path(shutil.copytree(shelf / "cats", folder / f"bad{number}"))
        (bad / name).unlink()
        if number < 2:
            os.mkfifo(bad / name)
        elif number < 4:
            (bad / name).symlink_to("/dev/zero")
        else:
            with (bad / name).open("wb") as file:
                file.truncate(1 << 42)
    watched = WatchedFolder(folder, worker.catalog, lambda: None)
    assert not watched.look(settled=True)
    assert set(worker.catalog.rejected) == {f"bad{number}" for number in range(6)}
    assert all("no regular file" in worker.catalog.rejected[f"bad{number}"] for number in (0, 1, 3))
    shutil.copytree(shelf / "cats", folder / "new")
    assert watched.look(settled=True)
    assert client.answer("new", asked[0]) == alone("cats", asked[0])

    (folder / "new" / weights).unlink()
    os.mkfifo(folder / "new" / weights)
    assert not watched.look(settled=True)
    assert "named pipe" in worker.catalog.rejected["new"]
    assert client.answer("new", asked[0]) == alone("cats", asked[0]), "the last good one goes on"
    for path in [*folder.glob("bad*"), folder / "new"]:
        shutil.rmtree(path)
    watched.look()
    assert not worker.catalog.rejected


def test_the_thread_goes_on_after_an_error_that_nobody_thought_of(
    worker: Any, shelf: Path, folder: Path, shown: set[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    original, failures = WatchedFolder._found, iter([RuntimeError("odd"), RuntimeError("odd")])

    def found(watched: WatchedFolder) -> Any:
        for failure in failures:
            raise failure
        return original(watched)

    monkeypatch.setattr(WatchedFolder, "_found", found)
    shutil.copytree(shelf / "cats", folder / "new")
    watched = WatchedFolder(folder, worker.catalog, lambda: None, every=0.01)
    watched.start()
    try:
        wait_until(lambda: "new" in {adapter.name for adapter in worker.catalog.adapters()})
    finally:
        watched.stop()
        watched.join(30)
    assert caplog.text.count("odd") == 1
    shutil.rmtree(folder / "new")
    watched.look()
