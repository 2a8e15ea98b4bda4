"""The catalog of adapters: what it refuses, and what it keeps of that.

Changes while it serves: http/test_admin.py.

Names of adapters, too: `serving/names.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
from adapter_files import header_of, set_header
from serving_fixtures import BASE_NAME, Client

from llava_steering_plugin.adapters.stored.folder import HEADER
from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.upstream.names import harmless

pytest_plugins = ["serving_fixtures", "changing_fixtures", "api_fixtures"]


def test_whatever_an_odd_adapter_raises_is_its_refusal_and_only_the_newest_are_kept(
    worker: Any, shelf: Path, shown: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: Any) -> None:
        raise KeyError("what nobody has thought of")

    monkeypatch.setattr(worker.pool, "load", odd)
    for number in range(120):
        with pytest.raises(AdapterError, match="KeyError: 'what nobody"):
            worker.catalog.put(f"n{number}", str(shelf / "cats"))
    assert list(worker.catalog.rejected) == [f"n{number}" for number in range(20, 120)]
    with pytest.raises(ArgumentsError):
        worker.catalog.put("x" * 1_000_000, str(shelf / "cats"))
    assert max(map(len, worker.catalog.rejected)) < 10


def test_no_two_models_have_one_name_in_the_api(
    worker: Any, api: Client, shelf: Path, shown: set[str], tmp_path: Path
) -> None:
    """An adapter that is called like the base has the name there that the page shows; another may be called so."""
    other = shutil.copytree(shelf / "cats", tmp_path / "other")
    set_header(other, **{HEADER: json.dumps(json.loads(header_of(other)[HEADER]) | {"conversation": "mpt"})})
    on_page = f"llava-mpt-{harmless(BASE_NAME)}"
    assert worker.catalog.put(BASE_NAME, str(other)).id == on_page
    with pytest.raises(ArgumentsError, match=f"called in the API '{on_page}', the name of the adapter '{BASE_NAME}'"):
        worker.catalog.put(on_page, str(shelf / "cats"))
    listed = [each["id"] for each in requests.get(f"{api.address}/v1/models", timeout=60).json()["data"]]
    assert len(listed) == len(set(listed)) == len(worker.catalog.names())
    for name in listed:
        assert requests.get(f"{api.address}/v1/models/{name}", timeout=60).json()["id"] == name
    worker.catalog.drop(BASE_NAME)
    assert worker.catalog.put(on_page, str(shelf / "cats")).id == on_page
