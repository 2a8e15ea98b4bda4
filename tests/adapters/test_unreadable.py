"""Adapters that are there and closed to this user: a message about access, and not one about damage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import without_privileges

from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.stored.folder import CONFIG, WEIGHTS
from llava_steering_plugin.adapters.stored.locate import find, read
from llava_steering_plugin.adapters.stored.writing import write_folder
from llava_steering_plugin.errors import AdapterError


@pytest.fixture
def adapter() -> Iterator[Path]:
    """An adapter below folders that are open to all, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "pets"
        base = BaseModel("/models/base", "llava_llama", 64, 4, 700)
        write_folder(path, AdapterConfig("mores", {"rank": 1}, base, "v1"), {}, "{}", "")
        for file in path.iterdir():
            file.chmod(0o644)
        path.chmod(0o755)
        with without_privileges():
            assert getattr(find(path), "path", None) == path
            assert read(path).config.mode == "mores"
        yield path
        path.chmod(0o755)


def test_a_closed_config_is_no_reason_to_take_the_folder_for_a_model(adapter: Path) -> None:
    (adapter / CONFIG).chmod(0)
    with without_privileges(), pytest.raises(AdapterError, match=r"steering_config\.json .*Permission denied.*allowed"):
        find(adapter)


@pytest.mark.parametrize("beside", [True, False], ids=["with a config beside", "alone"])
def test_closed_weights_are_not_called_missing_or_damaged(adapter: Path, beside: bool) -> None:
    (adapter / WEIGHTS).chmod(0)
    if not beside:
        (adapter / CONFIG).unlink()
    with without_privileges(), pytest.raises(AdapterError, match=r"Permission denied.*allowed to read") as error:
        read(find(adapter) or adapter)
    assert str(adapter / WEIGHTS) in str(error.value)
    assert "damaged" not in str(error.value)


def test_a_closed_folder_is_one_clear_error(adapter: Path) -> None:
    adapter.chmod(0)
    for call in (find, read):
        with without_privileges(), pytest.raises(AdapterError, match=r"pets/\w+\.\w+ .*Permission denied"):
            call(adapter)


def test_below_a_closed_folder_there_is_no_adapter_and_what_upstream_says_stays_its_own(
    adapter: Path, patched_llava: Path
) -> None:
    from llava.mm_utils import get_model_name_from_path

    adapter.chmod(0)
    with without_privileges():
        assert get_model_name_from_path(str(adapter / "below")) == "below"


def test_a_config_that_says_nothing_does_not_hide_weights_that_do(adapter: Path) -> None:
    (adapter / CONFIG).write_text('{"peft_type": null}')
    assert getattr(find(adapter), "path", None) == adapter
