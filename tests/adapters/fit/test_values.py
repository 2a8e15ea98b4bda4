"""Adapters whose values are finite in the file and overflow where they are used are refused at every door.

Holds for `adapters/fit/values.py` and `adapters/parts/image_settings.py`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import as_version_0_1, change_settings, change_tensors
from pooled import alone
from steered import PROMPT, ids_of, load_llava, logits_of, pictures
from tiny_llava import TinyLlava
from torch import Tensor

from llava_steering_plugin import AdapterPool, load_adapter
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.hooks.owner import owner_of
from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import setting
from llava_steering_plugin.modes.mores import MoReS, Steering
from llava_steering_plugin.serving.catalog import AdapterCatalog

pytest_plugins = ["steered_fixtures", "pooled_fixtures"]

Change = Callable[[Path], object]
BASIS, SHIFT = "adapter.layers.1.vis.steer_basis", "adapter.layers.1.vis.steer_shift"
FACTORS, ROUTER = "adapter.layers.1.mlp.down_proj.routed_b", "adapter.layers.1.mlp.down_proj.router_ab"
POOL_A = "adapter.layers.1.self_attn.q_proj.routed_a"
PROJECTOR = "base.model.mm_projector.0.weight"


def one(name: str, value: float, dtype: torch.dtype = torch.float32) -> Change:
    """Set one number of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[3] = value

    return lambda folder: change_tensors(folder, change)


def times(name: str, factor: float) -> Change:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: tensors[name] * factor}))


def more(name: str, value: float, *shape: int) -> Change:
    """Add a trained part of the base."""
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({f"base.{name}": torch.full(shape, value)})
    )


def rows(condition: float) -> Change:
    """Make the second row of a basis depend on the first, but for one part in `condition`."""

    def change(tensors: dict[str, Tensor]) -> None:
        first, second = torch.linalg.qr(tensors[BASIS].T.double())[0].T
        tensors[BASIS] = torch.stack([first, first + second / condition]).float().contiguous()

    return lambda folder: change_tensors(folder, change)


# By name: the adapter, what is done to it, the tensor or setting that the message names, and the reason it gives.
FLOAT32: dict[str, tuple[str, Change, str, str]] = {
    "double of mores": ("cats", one(SHIFT, 1e300, torch.float64), SHIFT, "too large for float32"),
    "double of mixlora": ("pets", one(FACTORS, -1e39, torch.float64), FACTORS, "too large for float32"),
    "double of a projector": ("birds", one(PROJECTOR, 1e300, torch.float64), PROJECTOR, "too large for float32"),
    "no basis": ("cats", times(BASIS, 0), BASIS, "span no subspace"),
    "equal rows": ("cats", rows(float("inf")), BASIS, "span no subspace"),
    "rows alike": ("cats", rows(1e7), BASIS, "R R^T - I"),
    "basis of one zero row": (
        "dogs",
        times("adapter.layers.2.text.steer_basis", 0),
        "adapter.layers.2.text.steer_basis",
        "R R^T - I",
    ),
    "huge shift": ("cats", one(SHIFT, 1e30), SHIFT, "too large for float32"),
    "growing shifts": (
        "cats",
        lambda folder: change_tensors(
            folder, lambda each: [each[name].mul_(1e15) for name in each if name.endswith("steer_shift")]
        ),
        SHIFT,
        "update of hidden states overflows",
    ),
    "huge factors": ("pets", one(FACTORS, 1e15), FACTORS, "overflows"),
    "huge pool": ("fish", one("adapter.layers.3.mlp.down_proj.routed_a", 1e12), "down_proj.routed_a", "overflow"),
    "huge router": ("pets", one(ROUTER, 1e19), ROUTER, "overflow float32"),
    "huge scale": ("pets", lambda folder: change_settings(folder, alpha=1e308), "alpha", "within float32"),
    "no scale": ("pets", lambda folder: change_settings(folder, alpha=1e-300), "alpha", "within float32"),
    "endless scale": ("pets", lambda folder: change_settings(folder, alpha=10**400), "alpha", "63 bits"),
    "scaled factors": ("pets", lambda folder: change_settings(folder, alpha=1e20), "routed_b", "alpha / rank = 5e+19"),
    "projector's product": ("birds", times(PROJECTOR, 1e19), PROJECTOR, "products with image features"),
    "no layers": ("cats", lambda folder: change_settings(folder, "layers"), "layers", "unknown what it computes"),
    "several absent": ("pets", lambda folder: change_settings(folder, "alpha", "rank"), "rank, alpha", "settings lack"),
}
FLOAT16: dict[str, tuple[str, Change, str, str]] = {
    "projector": ("birds", one(PROJECTOR, 1e5), PROJECTOR, "too large for float16"),
    "projector's bias": ("birds", one("base.model.mm_projector.2.bias", -7e4), "mm_projector.2.bias", "float16"),
    "projector's product": ("birds", times(PROJECTOR, 3e4), PROJECTOR, "products with image features"),
    "projector's last bias": (
        "birds",
        one("base.model.mm_projector.2.bias", 6e4),
        "mm_projector",
        "products with image",
    ),
    "linear": ("birds", more("model.layers.0.mlp.down_proj.weight", 3e4, 64, 128), "down_proj", "products with hidden"),
    "head": ("birds", more("lm_head.weight", 3e4, 700, 64), "base.lm_head", "products with hidden states overflow"),
    "norm": ("birds", more("model.norm.weight", 6e4, 64), "base.model.norm", "no room for what the layers"),
    "embeddings": ("birds", more("model.embed_tokens.weight", 3e4, 700, 64), "embed_tokens", "no room for what"),
    "shift": ("cats", times(SHIFT, 1e5), SHIFT, "overflows float16"),
    "pool": ("pets", one(POOL_A, 1e5), POOL_A, "overflow float16"),
    "factors": ("pets", one(FACTORS, 1e5), FACTORS, "overflows float16"),
    "scaled": ("pets", lambda folder: change_settings(folder, alpha=1e6), FACTORS, "overflows float16"),
}


@pytest.fixture(scope="module")
def half(tiny: TinyLlava, patched_llava: Path) -> Any:
    return load_llava(tiny.llava, tokenizer_padding_side="left").half()


@pytest.fixture
def spoilt(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, change: Change) -> Path:
        folder = Path(shutil.copytree(folders[name], tmp_path / name))
        change(folder)
        return folder

    return make


def refused(model: Any, folder: Path, name: str, reason: str) -> None:
    """Loading must fail with one clear error, on the model and in a pool on it, and change nothing."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder)
    assert owner_of(model) is None
    pool = AdapterPool(model)
    try:
        with pytest.raises(AdapterError) as again:
            pool.load("it", folder)
        catalog = AdapterCatalog(pool, "base")
        with pytest.raises(AdapterError):
            catalog.put("it", folder)
        assert pool.names() == [AdapterPool.BASE] and name in catalog.rejected["it"]
    finally:
        pool.remove()
    for message in (str(error.value), str(again.value)):
        assert name in message and reason in message
        assert "\n  - " in message or "lack" in message
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("kind", FLOAT32)
def test_values_that_overflow_in_float32_are_refused(shared: Any, spoilt: Any, kind: str) -> None:
    name, change, tensor, reason = FLOAT32[kind]
    refused(shared, spoilt(name, change), tensor, reason)


@pytest.mark.parametrize("kind", FLOAT16)
def test_values_that_overflow_in_float16_alone_load_in_float32_and_compute(
    shared: Any, half: Any, spoilt: Any, kind: str
) -> None:
    name, change, tensor, reason = FLOAT16[kind]
    folder = spoilt(name, change)
    refused(half, folder, tensor, reason)
    with alone(shared, folder) as model:
        assert bool(torch.isfinite(logits_of(model, ids_of(PROMPT), pictures(1))).all())


def test_sound_adapters_of_every_kind_load_in_float16_too(half: Any, folders: dict[str, Path]) -> None:
    pool = AdapterPool(half)
    for name, folder in folders.items():
        pool.load(name, folder)
    pool.remove()


def test_every_tensor_that_overflows_is_in_one_error(shared: Any, spoilt: Any) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(("steer_offset", "steer_shift")):
                tensors[name] = tensors[name].double() * 1e300

    with pytest.raises(AdapterError) as error:
        load_adapter(shared, spoilt("cats", lambda folder: change_tensors(folder, change)))
    assert str(error.value).count("\n  - ") == 8


def test_the_tolerance_of_a_basis_is_far_above_what_sound_ones_need_and_far_below_what_shows() -> None:
    from llava_steering_plugin.modes.mores import ORTHONORMAL

    for condition in (1.0, 1e2, 1e4):
        steering = Steering(64, 4)
        with torch.no_grad():
            steering.steer_basis.mul_(torch.logspace(0, -torch.tensor(condition).log10().item(), 4).unsqueeze(1))
        basis = steering.basis().detach().double()
        assert float((basis @ basis.T - torch.eye(4)).abs().max()) < ORTHONORMAL / 100


# Settings


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A version of MoReS with two settings more, as a later version of the package may have."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Later(MoReS):
        speed: float = setting(2.0, "how fast", absent=1.0)
        depth: int = setting(1, "how deep")

    get = registry.get
    monkeypatch.setattr(registry, "get", lambda name: Later if name == "mores" else get(name))
    yield


def test_a_setting_of_later_means_what_its_declaration_says_and_others_are_refused(
    later: None, shared: Any, folders: dict[str, Path], spoilt: Any
) -> None:
    with pytest.raises(AdapterError, match="the adapter's settings lack depth, so it is unknown what it computes"):
        load_adapter(shared, folders["cats"])
    attachment = load_adapter(shared, spoilt("cats", lambda folder: change_settings(folder, depth=3)))
    assert vars(attachment.mode)["speed"] == 1.0 and vars(attachment.mode)["depth"] == 3


def test_settings_that_the_first_adapters_lack_say_what_those_mean() -> None:
    """Adapters that name only these settings exist. One that is added without `absent` makes them useless."""
    first = {
        "mores": "rank tokens modality layers dropout",
        "mixlora": "factors rank alpha dropout conditional ifs_weight start_layer targets routing router_grad balance "
        "noise variant",
    }
    from llava_steering_plugin.modes.base import meaning_of_absent

    for name, settings in first.items():
        assert meaning_of_absent(registry.get(name), dict.fromkeys(settings.split()))[1] == []
        assert meaning_of_absent(registry.get(name), {})[1] == settings.split()


# How images are encoded


def test_an_old_adapter_without_its_config_json_is_refused_because_its_images_are_unknown(
    shared: Any, spoilt: Any, patched_llava: Path
) -> None:
    from llava.model.builder import load_pretrained_model

    folder = spoilt("cats", as_version_0_1)
    pool = AdapterPool(shared)
    pool.load("cats", folder)
    pool.remove()
    (folder / "config.json").unlink()
    message = "config.json is missing.*unknown how images were encoded in training"
    with pytest.raises(AdapterError, match=message):
        load_adapter(shared, folder)
    with pytest.raises(AdapterError, match=message):
        AdapterPool(shared).load("cats", folder)
    with pytest.raises(AdapterError, match=message):
        load_pretrained_model(str(folder), None, "llava", device="cpu", device_map="cpu")


@pytest.mark.parametrize("side", ["model", "adapter"])
def test_other_layers_of_the_tower_are_refused_whichever_side_names_them(
    shared: Any, folders: dict[str, Path], spoilt: Any, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    from adapter_files import change_llava_config

    folder = folders["cats"]
    if side == "adapter":
        folder = spoilt("cats", lambda folder: change_llava_config(folder, mm_vision_select_layer=None))
    else:
        monkeypatch.setattr(shared.config, "mm_vision_select_layer", -1)
    for as_trained in (False, True) if side == "adapter" else (False,):  # else the model is given the adapter's
        with pytest.raises(AdapterError, match="it was trained with mm_vision_select_layer"):
            load_adapter(shared, folder, as_trained=as_trained)
    with pytest.raises(AdapterError, match="it was trained with mm_vision_select_layer"):
        AdapterPool(shared).load("cats", folder)
