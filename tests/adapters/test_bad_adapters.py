"""Adapters that are damaged or foreign are refused, and the model stays as it is.

Holds for `adapters/stored/folder.py` and `adapters/fit/compatibility.py`. Other bases: `test_fingerprint.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from steered import IMAGE, base_of, ids_of, pictures, strengthen, traces, words
from tiny_llava import HIDDEN
from torch import Tensor

from llava_steering_plugin import attach, load_adapter, remove, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import AdapterError, SteeringError
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "llava_steering_config.json"
OLD_CONFIG = "adapter_config.json"  # its name in adapters of version 0.1, and in PEFT's
PROMPT = ids_of([1, *words(2), IMAGE, *words(4, seed=1)])
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture(scope="module")
def good(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter; read-only."""
    folder = tmp_path_factory.mktemp("good") / "pets"
    attachment = strengthen(attach(frozen, MoReS(rank=2, tokens="all")))
    save_adapter(frozen, folder)
    attachment.remove()
    return folder


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """A copy of the good adapter, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "pets"))


def spoil(folder: Path, change: Change) -> None:
    """Rewrites the weights with other tensors and another config in the header."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        header = json.loads(file.metadata()["llava_steering"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, header)
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "llava_steering": json.dumps(header)})


def refused(model: Any, frozen: Any, folder: Path | str, *expected: str, kind: type = AdapterError) -> str:
    """Loading must fail with one error that says all of `expected`, and leave the model as it was."""
    before, weights = traces(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SteeringError) as error:
        load_adapter(model, folder)
    message = str(error.value)
    assert isinstance(error.value, kind), repr(error.value)
    for words_expected in expected:
        assert words_expected in message
    assert traces(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        asked = {"input_ids": PROMPT, "images": pictures(1)}
        assert torch.equal(model(**asked).logits, frozen(**asked).logits)
    return message


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT, images=pictures(1)).logits


def answer_with(model: Any, folder: Path) -> Tensor:
    """The logits with the adapter, which change something, and then the model without it again."""
    plain = logits(model)
    load_adapter(model, folder)
    steered = logits(model)
    remove(model)
    assert not torch.equal(steered, plain) and torch.equal(logits(model), plain)
    return steered


def test_the_adapter_that_the_others_are_made_from_is_good(model: Any, adapter: Path) -> None:
    spoil(adapter, lambda tensors, header: None)
    assert isinstance(load_adapter(model, adapter), Attachment)


# Files


@pytest.mark.parametrize("left", [0, 4, 60, 1000, 20_000])
def test_a_truncated_file(model: Any, frozen: Any, adapter: Path, left: int) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    assert len(data) > 20_000 / 2
    (adapter / WEIGHTS).write_bytes(data[: min(left, len(data) - 1)])
    refused(model, frozen, adapter, str(adapter / WEIGHTS), "damaged or cut short; copy it again")


def test_a_file_of_other_bytes(model: Any, frozen: Any, adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(b"\x80\x04PK" * 500)
    refused(model, frozen, adapter, "damaged or cut short")


def test_renamed_weights(model: Any, frozen: Any, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "model.safetensors")
    refused(model, frozen, adapter, f"no {WEIGHTS}", "missing or were renamed")


def test_weights_alone_are_enough_because_they_hold_the_config(model: Any, adapter: Path) -> None:
    expected = answer_with(model, adapter)
    for file in adapter.iterdir():
        if file.name != WEIGHTS:
            file.unlink()
    assert torch.equal(answer_with(model, adapter), expected)


def test_a_renamed_folder_is_no_matter(model: Any, adapter: Path) -> None:
    expected = answer_with(model, adapter)
    renamed = adapter.rename(adapter.parent / "llava-lora-mpt-v1.6-plain")
    assert torch.equal(answer_with(model, renamed), expected)


def test_a_folder_without_an_adapter(model: Any, frozen: Any, adapter: Path, tmp_path: Path) -> None:
    empty = tmp_path / "run"
    empty.mkdir()
    refused(model, frozen, empty, f"{empty} holds no adapter")
    adapter.rename(empty / "checkpoint-20")
    refused(model, frozen, empty, "It has checkpoint-20: give one of these")


@pytest.mark.parametrize("name", ["missing", "nobody/here", "/nowhere/at/all"])
def test_a_folder_that_is_not_there(model: Any, frozen: Any, name: str) -> None:
    refused(model, frozen, name, f"{name} is no folder")


def test_a_file_where_a_folder_is_expected(model: Any, frozen: Any, adapter: Path) -> None:
    refused(model, frozen, adapter / WEIGHTS, "is no folder. Give the adapter's folder")


@pytest.mark.parametrize("name", [CONFIG, OLD_CONFIG])
@pytest.mark.parametrize("text", [b"\xff\xfe\x00garbage", b"{", b"[]", b"", b"null"])
def test_a_spoilt_config_without_weights(model: Any, frozen: Any, adapter: Path, text: bytes, name: str) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / CONFIG).unlink()
    (adapter / name).write_bytes(text)
    refused(model, frozen, adapter, str(adapter / name))


def test_a_foreign_adapter(model: Any, frozen: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    small = base_of(hidden_size=8, num_hidden_layers=1)
    get_peft_model(small, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    refused(model, frozen, tmp_path, "peft_type is 'LORA'", "Load it with the library that made it")
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(model, frozen, tmp_path, "peft_type is 'LORA'")
    (tmp_path / OLD_CONFIG).unlink()
    (tmp_path / "adapter_model.bin").rename(tmp_path / WEIGHTS)
    refused(model, frozen, tmp_path, "is not an adapter of this plugin")


# Tensors and header


def set_tensor(name: str, value: Tensor) -> Change:
    return lambda tensors, header: tensors.__setitem__(name, value)


def set_header(path: str, value: Any) -> Change:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        *parents, leaf = path.split(".")
        for parent in parents:
            header = header[parent]
        if value is None:
            del header[leaf]
        else:
            header[leaf] = value

    return change


BASIS = "adapter.layers.1.vis.steer_basis"
SPOILT: dict[str, tuple[Change, tuple[str, ...]]] = {
    "shape": (set_tensor(BASIS, torch.zeros(3, HIDDEN)), (f"{BASIS} is [3, {HIDDEN}]", f"needs [2, {HIDDEN}]")),
    "integers": (set_tensor(BASIS, torch.ones(2, HIDDEN).int()), (BASIS, "torch.int32")),
    "booleans": (set_tensor(BASIS, torch.ones(2, HIDDEN).bool()), (BASIS, "torch.bool")),
    "eight bits": (set_tensor(BASIS, torch.ones(2, HIDDEN).to(torch.float8_e4m3fn)), (BASIS, "float8_e4m3fn")),
    "NaN": (set_tensor(BASIS, torch.full((2, HIDDEN), torch.nan)), (BASIS, "128 of 128 values are NaN or infinite")),
    "infinite": (set_tensor(BASIS, torch.full((2, HIDDEN), torch.inf)), (BASIS, "NaN or infinite")),
    "stray tensor": (set_tensor("lm_head.weight", torch.zeros(2)), ("lm_head.weight: unknown kind of tensor",)),
    "part of no model": (
        set_tensor("base.model.mm_projector.9.weight", torch.zeros(2)),
        ("base.model.mm_projector.9.weight has no place in this model",),
    ),
    "no fingerprint": (lambda tensors, header: tensors.__delitem__("fingerprint.rows"), ("fingerprint",)),
    "flat fingerprint": (set_tensor("fingerprint.rows", torch.zeros(16)), ("fingerprint",)),
    "short fingerprint": (set_tensor("fingerprint.rows", torch.zeros(3, HIDDEN)), ("fingerprint",)),
    "fingerprint of floats": (set_tensor("fingerprint.ids", torch.zeros(16)), ("fingerprint.ids", "row numbers")),
    "fingerprint below zero": (set_tensor("fingerprint.ids", -torch.ones(16).long()), ("fingerprint.ids",)),
    "newer format": (set_header("format_version", 3), ("adapter format 3", "pip install -U 'llava-steering-plugin'")),
    "names of PEFT's without their beginning": (
        set_header("format_version", 2),
        ("damaged or was edited by hand", "peft_prefix is None or missing"),
    ),
    "no format": (set_header("format_version", None), ("adapter format None",)),
    "no base": (set_header("base", None), ("damaged or was edited by hand", "base is None")),
    "base of no size": (set_header("base.num_layers", "32"), ("base.num_layers is '32'",)),
    "unknown mode": (set_header("mode", "morse"), ("needs a mode that is not installed", "did you mean 'mores'")),
    "unknown setting": (set_header("settings.speed", 9), ("another version of its mode, or damaged", "no speed")),
    "setting of another type": (set_header("settings.rank", 2.0), ("rank is 2.0 where int is expected",)),
    "setting out of range": (set_header("settings.rank", 0), ("out of range", "at least 1")),
    "layers that the base lacks": (set_header("settings.layers", "0-9"), ("goes beyond layer 3",)),
    "other rank": (set_header("settings.rank", 3), ("does not fit its own settings", f"needs [3, {HIDDEN}]")),
    "token ids of another type": (set_header("added_tokens", {"[PAD]": "700"}), ("added_tokens.[PAD] is '700'",)),
    "added tokens without rows": (
        set_header("added_tokens", {"[PAD]": 700}),
        ("added_tokens.input is missing", "added_tokens.output is missing"),
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_spoilt_contents(model: Any, frozen: Any, adapter: Path, spoilt: str) -> None:
    change, expected = SPOILT[spoilt]
    spoil(adapter, change)
    kind = SteeringError if spoilt == "layers that the base lacks" else AdapterError
    refused(model, frozen, adapter, *expected, kind=kind)


def test_rows_of_added_tokens_in_another_shape(model: Any, frozen: Any, adapter: Path) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["added_tokens"] = {"[PAD]": 700}
        tensors["added_tokens.input"] = torch.zeros(2, HIDDEN)
        tensors["added_tokens.output"] = torch.zeros(1, HIDDEN + 1)

    spoil(adapter, change)
    refused(model, frozen, adapter, "added_tokens.input is [2, 64]", "added_tokens.output is [1, 65]")
    assert model.get_input_embeddings().weight.shape[0] == 700


def test_every_misfit_is_in_one_error(model: Any, frozen: Any, adapter: Path) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        del tensors["adapter.layers.0.vis.steer_shift"]
        tensors["adapter.layers.2.vis.steer_offset"] = torch.zeros(5)
        tensors["adapter.layers.9.vis.steer_basis"] = torch.zeros(2, HIDDEN)
        tensors["base.model.mm_projector.0.weight"] = torch.zeros(HIDDEN, 3)

    spoil(adapter, change)
    message = refused(
        model,
        frozen,
        adapter,
        "adapter.layers.0.vis.steer_shift is missing",
        "adapter.layers.2.vis.steer_offset is [5] where the model needs [2]",
        "adapter.layers.9.vis.steer_basis has no place in this model",
        "base.model.mm_projector.0.weight is [64, 3] where the model needs [64, 64]",
    )
    assert message.count("\n  - ") == 4


def test_every_damaged_tensor_is_in_one_error(model: Any, frozen: Any, adapter: Path) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("steer_offset"):
                tensors[name][0] = torch.nan
            elif name.endswith("steer_basis"):
                tensors[name] = tensors[name].to(torch.int8)

    spoil(adapter, change)
    assert refused(model, frozen, adapter, "is damaged").count("\n  - ") == 8
