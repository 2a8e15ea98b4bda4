"""An administrator adds, replaces and removes adapters while the worker serves; the controller's list follows."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from changing_fixtures import listed
from ports import free_port
from serving_fixtures import NAMES, TOKEN, Alone, Client, Question, listening, wait_until

from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.serving.http.admin import Admin
from llava_steering_plugin.serving.http.app import build
from llava_steering_plugin.serving.http.limits import Limits

pytest_plugins = ["serving_fixtures", "changing_fixtures"]


def put(client: Client, name: str, path: object) -> requests.Response:
    return client.admin("POST", json={"name": name, "path": str(path)})


def test_an_administrator_adds_replaces_and_removes_adapters_and_the_controllers_list_follows(
    admin: Client, controller: str, folder: Path, shelf: Path, shown: set[str], alone: Alone, asked: list[Question]
) -> None:
    shutil.copytree(shelf / "cats", folder / "one")
    shutil.copytree(shelf / "dogs", folder / "two")
    assert put(admin, "new", "one").json() == {"name": "new", "shown": "new"}
    wait_until(lambda: listed(controller) == shown | {"new"})
    assert admin.answer("new", asked[0]) == alone("cats", asked[0])
    assert put(admin, "new", folder / "two").ok
    assert admin.answer("new", asked[0]) == alone("dogs", asked[0])
    [known] = [entry for entry in admin.admin("GET").json()["adapters"] if entry["name"] == "new"]
    assert (known["mode"], known["settings"]["method"]) == ("peft", "ia3")
    assert known["source"] == str(folder / "two") and known["conversation"] == "v1"
    assert admin.admin("DELETE", "/new").ok
    wait_until(lambda: listed(controller) == shown)
    assert admin.refused(asked[0].body("new"))[0] == 404
    assert admin.admin("DELETE", "/new").status_code == 404


def test_an_answer_on_its_way_keeps_the_adapter_it_began_with(
    admin: Client, worker: Any, shelf: Path, folder: Path, shown: set[str], alone: Alone, asked: list[Question]
) -> None:
    shutil.copytree(shelf / "dogs", folder / "dogs")
    begun, go, first = threading.Event(), threading.Event(), []

    def held(*_: Any) -> None:
        """Hold the first answer after its first token, and no other one."""
        if not first:
            first.append(threading.get_ident())
        elif first[0] == threading.get_ident():
            begun.set()
            assert go.wait(120)

    handle = worker.model.model.register_forward_pre_hook(held)
    with ThreadPoolExecutor(1) as user:
        try:
            answer = user.submit(admin.answer, "cats", asked[0])
            assert begun.wait(60)
            assert put(admin, "cats", "dogs").ok
            replaced = admin.answer("cats", asked[0])
            assert admin.admin("DELETE", "/cats").ok
            assert not answer.done()
        finally:
            go.set()
            handle.remove()
        assert answer.result() == alone("cats", asked[0])
    assert replaced == alone("dogs", asked[0])


def test_a_broken_adapter_is_rejected_with_the_reason_and_disturbs_nobody(
    admin: Client, controller: str, shelf: Path, folder: Path, shown: set[str], alone: Alone, asked: list[Question]
) -> None:
    shutil.copytree(shelf / "cats", folder / "cut")
    weights = folder / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused = put(admin, "cats", "cut")
    assert refused.status_code == 409
    assert "cut short" in refused.text
    assert "cut short" in admin.admin("GET").json()["rejected"]["cats"]
    assert admin.answer("cats", asked[0]) == alone("cats", asked[0])
    assert listed(controller) == shown
    assert put(admin, "pets", "nothing-here").status_code == 409
    # Shown like one that is there: two entries of one name could not be told apart.
    shutil.copytree(shelf / "dogs", folder / "good")
    assert "the name of the adapter 'mixlora-x'" in put(admin, "mixl.ora-x", "good").text
    assert put(admin, "cats", shelf / "cats").status_code == 403, "not below the folder"


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "..", ".", "one/../../outside", "link", "owner/../../x", "~/adapters"]
)
def test_an_administrator_reaches_no_folder_but_the_servers_own(
    admin: Client, folder: Path, shelf: Path, path: str
) -> None:
    shutil.copytree(shelf / "cats", folder.parent / "outside")
    (folder / "link").symlink_to(folder.parent / "outside")
    response = put(admin, "new", path)
    assert response.status_code in (403, 409)
    assert "new" not in {entry["name"] for entry in admin.admin("GET").json()["adapters"]}


def test_two_names_with_a_slash_are_a_folder_where_there_is_one_and_else_a_hub_id_and_never_the_current_folder(
    admin: Client, folder: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf / "cats", folder / "team" / "pets")
    shutil.copytree(shelf / "cats", folder.parent / "started" / "owner" / "name")
    monkeypatch.chdir(folder.parent / "started")
    (folder.parent / "started" / "team" / "pets").mkdir(parents=True)
    assert put(admin, "new", "team/pets").ok
    [known] = [entry for entry in admin.admin("GET").json()["adapters"] if entry["name"] == "new"]
    assert known["source"] == str((folder / "team" / "pets").resolve())
    assert put(admin, "newer", "owner/name").status_code == 403
    refused = put(admin, "newer", "nobody/nothing")
    assert refused.status_code == 409 and "AdapterError: nobody/nothing" in refused.text


def test_with_any_path_a_relative_one_means_the_watched_folder_first_and_others_are_taken_too(
    worker: Any, folder: Path, shelf: Path, shown: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf / "cats", folder / "here")
    shutil.copytree(shelf / "dogs", tmp_path / "started" / "here")
    shutil.copytree(shelf / "dogs", tmp_path / "started" / "there")
    (tmp_path / "scratch" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "scratch")  # as `serve` has its worker run
    limits = Limits(running=4)
    start = tmp_path / "started"
    admin = Admin(TOKEN, worker.catalog, lambda: None, limits, folder=folder, any_path=True, start=start)
    routes = admin.routes()
    with listening(build(worker, limits, admin=routes), free_port()) as client:
        for path in ("here", "there", tmp_path / "started" / "here"):
            assert put(client, "new", path).ok
            [entry] = [entry for entry in client.admin("GET").json()["adapters"] if entry["name"] == "new"]
            wanted = folder / "here" if path == "here" else tmp_path / "started" / path
            assert Path(entry["source"]).resolve() == wanted.resolve()
        looked = f"in {folder.resolve()} or {start.resolve()}."
        refused = put(client, "newer", "nobody/nothing")
        assert refused.status_code == 409 and "AdapterError: nobody/nothing" in refused.text
        assert f"No folder of that name is {looked}" in refused.text
        refused = put(client, "newer", "nothing")
        assert refused.status_code == 409 and f"nothing is neither a hub id nor {looked}" in refused.text


def test_of_two_who_remove_one_adapter_at_once_one_is_told_that_there_is_none(
    admin: Client, worker: Any, folder: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf / "cats", folder / "one")
    assert put(admin, "new", "one").ok
    held, arrived = threading.Event(), threading.Semaphore(0)
    change = Admin._change

    async def counted(self: Admin, what: Callable[[], Any]) -> Any:
        arrived.release()
        return await change(self, what)

    def slow(*_: str) -> None:
        held.wait(60)
        raise AdapterError("it was slow")

    monkeypatch.setattr(Admin, "_change", counted)
    monkeypatch.setattr(worker.catalog, "put", slow)
    with ThreadPoolExecutor(3) as administrators:
        try:
            slowly = administrators.submit(put, admin, "newer", "one")
            assert arrived.acquire(timeout=60)
            answers = [administrators.submit(admin.admin, "DELETE", "/new") for _ in range(2)]
            assert all(arrived.acquire(timeout=60) for _ in answers)
        finally:
            held.set()
        assert slowly.result().status_code == 409
        assert sorted(answer.result().status_code for answer in answers) == [200, 404]


def test_adapters_that_load_slowly_keep_no_request_from_being_checked(
    admin: Client, worker: Any, alone: Alone, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are checked in threads of asyncio's, of which there are 32 at most."""
    held = threading.Event()
    arrived: list[str] = []
    change = Admin._change

    async def counted(self: Admin, what: Callable[[], Any]) -> Any:
        arrived.append("one")
        return await change(self, what)

    def slow(*_: str) -> None:
        held.wait(60)
        raise AdapterError("it was slow")

    monkeypatch.setattr(Admin, "_change", counted)
    monkeypatch.setattr(worker.catalog, "put", slow)
    with ThreadPoolExecutor(40) as administrators:
        try:
            answers = [administrators.submit(put, admin, "new", "nobody/nothing") for _ in range(40)]
            wait_until(lambda: len(arrived) == 40)
            assert admin.answer("cats", asked[0]) == alone("cats", asked[0])
            assert not any(answer.done() for answer in answers)
        finally:
            held.set()
        assert {answer.result().status_code for answer in answers} == {409}


@pytest.mark.parametrize("token", ["ein-schlüssel-der-lang-genug-ist", "bytes-that-are-no-text-\udcff\udcfe"])
def test_a_token_may_have_other_letters_than_english_ones(worker: Any, token: str) -> None:
    limits = Limits(running=4)
    routes = Admin(token, worker.catalog, lambda: None, limits).routes()
    with listening(build(worker, limits, admin=routes), free_port()) as client:
        for given, status in ((os.fsencode(token), 200), (os.fsencode(token)[:-1], 401)):
            headers = {"Authorization": b"Bearer " + given}
            answer = requests.get(f"{client.address}/admin/adapters", headers=headers, timeout=30)
            assert answer.status_code == status


def test_without_the_right_token_nothing_is_told_and_nothing_changes(
    admin: Client, client: Client, shown: set[str]
) -> None:
    for token in ("", "wrong", TOKEN + "x", TOKEN[:-1], "\xff"):
        assert admin.admin("GET", token=token).status_code == 401
        assert admin.admin("DELETE", "/cats", token=token).status_code == 401
    assert requests.get(f"{admin.address}/admin/adapters", timeout=30).status_code == 401
    assert set(admin.admin("GET").json()) == {"base", "adapters", "rejected"}
    assert client.admin("GET").status_code == 404, "it is there although no token was set"
    assert len(admin.admin("GET").json()["adapters"]) == len(NAMES)


def test_a_short_token_is_refused(worker: Any) -> None:
    with pytest.raises(ArgumentsError, match="16 at least"):
        Admin("secret", worker.catalog, lambda: None, Limits())
