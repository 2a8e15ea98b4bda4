"""An adapter is found once and read once, whatever loads it (adapters/stored/locate.py, adapters/stored/folder.py)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_files import as_version_0_1
from safetensors import safe_open
from steered import strengthen
from tiny_llava import TinyLlava

from llava_steering_plugin import AdapterPool, attach, load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.folder import CONFIG, OLD_CONFIG, WEIGHTS, AdapterFolder
from llava_steering_plugin.adapters.stored.locate import find, locate, read
from llava_steering_plugin.adapters.stored.tensor_file import TensorFile
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.modes.mixlora import MixLoRA

pytest_plugins = ["steered_fixtures"]

HUB_ID = "somebody/pets"


@pytest.fixture
def pets(model: Any, tmp_path: Path) -> Path:
    """The folder of a MixLoRA, whose tensors are many; `model` is left without it."""
    attachment = strengthen(attach(model, MixLoRA(factors=4, rank=2)))
    attachment.config = replace(describe(attachment), conversation="v1")
    save_adapter(model, tmp_path / "pets")
    remove(model)
    return tmp_path / "pets"


@pytest.fixture
def tensor_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor of an adapter was read, whoever did it."""
    reads: Counter[str] = Counter()
    original = TensorFile.read

    def read(file: TensorFile, name: str) -> Any:
        reads.update([name])
        return original(file, name)

    monkeypatch.setattr(TensorFile, "read", read)
    return reads


@pytest.fixture
def look_ups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub ids that were looked up, in the order of the calls."""
    import huggingface_hub

    asked: list[str] = []
    original = huggingface_hub.snapshot_download

    def download(repository: str, *args: Any, **kwargs: Any) -> str:
        asked.append(repository)
        return original(repository, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.fixture
def on_the_hub(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The snapshot of `HUB_ID` in the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--somebody--pets"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    yield Path(shutil.copytree(pets, cached / "snapshots" / "0123"))


def by_upstreams_loader(model: Any, source: str) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    load_pretrained_model(source, None, get_model_name_from_path(source), device="cpu")


@pytest.fixture(autouse=True)
def as_upstream_was(patched_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the chat command changes for all of its process from the other tests."""
    monkeypatch.setattr("llava.utils.disable_torch_init", lambda: None)
    monkeypatch.setattr("llava_steering_plugin.cli.chat.quieten_libraries", lambda: None)


def by_the_chat(model: Any, source: str) -> None:
    from llava_steering_plugin.chat.session import open_chat

    open_chat(source, {"pets": source}, first="pets")


def test_an_adapter_on_the_hub_is_known_by_its_config_under_either_name(on_the_hub: Path) -> None:
    for name in (CONFIG, OLD_CONFIG):
        assert (on_the_hub / name).is_file()
        found = locate(HUB_ID)
        assert (found.path, found.config.mode) == (on_the_hub, "mixlora")
        assert found.llava_config is not None and found.llava_config["model_type"] == "llava_llama"
        if name == CONFIG:
            as_version_0_1(on_the_hub)
    (on_the_hub / OLD_CONFIG).unlink()
    assert find(HUB_ID) is None


def by_the_chat_command(model: Any, source: str) -> None:
    from typer.testing import CliRunner

    from llava_steering_plugin.cli import app

    result = CliRunner().invoke(app, ["chat", source, "--device", "cpu"], input="")
    assert result.exit_code == 0, result.output


DOORS: dict[str, Callable[[Any, str], object]] = {
    "load_adapter": load_adapter,
    "pool.load": lambda model, source: AdapterPool(model).load("pets", source),
    "load_pretrained_model": by_upstreams_loader,
    "open_chat": by_the_chat,
    "llava-steering chat": by_the_chat_command,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_tensor_is_read_once_for_one_load(model: Any, pets: Path, tensor_reads: Counter[str], door: str) -> None:
    with safe_open(pets / WEIGHTS, framework="pt") as file:
        names = list(file.keys())
    try:
        DOORS[door](model, str(pets))
    finally:
        owner = model.__dict__.get("llava_steering")
        if owner is not None:
            owner.remove()
    assert tensor_reads == Counter(names)


def test_an_adapter_that_a_pool_refuses_is_not_read_again_for_upstreams_loader(
    model: Any, pets: Path, tensor_reads: Counter[str]
) -> None:
    from adapter_files import change_llava_config

    change_llava_config(pets, image_aspect_ratio="square")
    tensor_reads.clear()
    by_the_chat(model, str(pets))
    assert set(tensor_reads.values()) == {1}


# Not upstream's own programs: they ask for the model's name first, and know nothing of folders that were found.
@pytest.mark.parametrize("door", sorted(DOORS.keys() - {"load_pretrained_model"}))
def test_a_hub_id_is_looked_up_once(model: Any, on_the_hub: Path, look_ups: list[str], door: str) -> None:
    try:
        DOORS[door](model, HUB_ID)
    finally:
        owner = model.__dict__.get("llava_steering")
        if owner is not None:
            owner.remove()
    assert look_ups == [HUB_ID]


def test_a_hub_id_is_found_as_the_folder_that_it_was_downloaded_to(on_the_hub: Path) -> None:
    found = locate(HUB_ID)
    assert (found.path, found.source) == (on_the_hub, HUB_ID)
    assert found.config.mode == "mixlora"


def test_what_was_found_is_taken_as_it_is(pets: Path, tiny: TinyLlava) -> None:
    folder = locate(pets)
    assert find(folder) is folder
    stored = folder.read()
    assert read(stored) is stored
    assert find(tiny.llava) is None
    with pytest.raises(AdapterError, match="holds no adapter"):
        locate(tiny.llava)


def test_what_a_folder_says_is_read_when_it_is_asked_for_and_once(pets: Path) -> None:
    folder = AdapterFolder(pets)
    before = folder.config
    (pets / WEIGHTS).unlink()
    assert folder.config is before
    with pytest.raises(AdapterError, match="weights are missing"):
        AdapterFolder(pets).read()


def test_the_configs_of_a_read_adapter_are_those_beside_its_tensors_whatever_replaces_the_folder(
    model: Any, pets: Path
) -> None:
    from adapter_files import change_llava_config

    stored = read(pets)
    change_llava_config(pets, image_aspect_ratio="anyres")
    assert stored.folder.llava_config is not None
    assert stored.folder.llava_config["image_aspect_ratio"] == "pad"
    assert read(pets).folder.llava_config != stored.folder.llava_config
