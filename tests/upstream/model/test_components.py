"""Towers and connectors by name in upstream's own train(): trained, saved, loaded, asked, and gone on with.

Covers `upstream/model/components.py`. Pairs of which nothing else here says more are slow; scripts/test.sh runs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from own_parts import ANYRES
from safetensors.torch import load_file
from steered import IMAGE, ids_of, load_llava, pictures, words
from tiny_llava import TinyLlava
from tiny_towers import TinyTowers
from training_runs import stage_1_overrides, train_flags, train_in_process

from llava_steering_plugin import AdapterPool
from llava_steering_plugin.adapters.stored.folder import EXTRA
from llava_steering_plugin.adapters.stored.locate import locate
from llava_steering_plugin.components.image_tokens import of_model
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.patch_grid import patch_grid

pytest_plugins = ["component_fixtures"]
pytestmark = pytest.mark.usefixtures("patched_llava")

QFORMER = "qformer:queries=5,layers=2,hidden=32,heads=2"
RESAMPLER = "resampler:queries=6,layers=1,heads=2,head_width=8"
# tower, connector, mode, tokens of an image, their side
PAIRS: list[Any] = [
    pytest.param("siglip", "avgpool", "mores", 4, 2, id="siglip-avgpool-mores"),
    pytest.param("mof", "mof-mlp", "mixlora", 32, None, id="mof-interleaved-mixlora"),
    pytest.param("dinov2", QFORMER, "mores", 5, None, id="dinov2-qformer-mores", marks=pytest.mark.slow),
    pytest.param("clip", RESAMPLER, "mixlora", 6, None, id="clip-resampler-mixlora", marks=pytest.mark.slow),
    pytest.param("siglip", "pixel-shuffle", "mixlora", 4, 2, id="siglip-shuffle-mixlora", marks=pytest.mark.slow),
    pytest.param("dinov2", "mlp2x_gelu", "mixlora", 16, 4, id="dinov2-mlp-mixlora", marks=pytest.mark.slow),
    pytest.param("mof", "linear", "mores", 16, 4, id="mof-linear-mores", marks=pytest.mark.slow),
]


def name_of(towers: TinyTowers, tower: str) -> str:
    return str(getattr(towers, tower))


def trained(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> list[float]:
    """Train two steps, a checkpoint after each, and return the losses."""
    two = {"model_name_or_path": tiny.llm, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    history = train_in_process(train_flags(tiny, output, {**two, **overrides}))
    return [entry["loss"] for entry in history if "loss" in entry]


def loaded(path: Path, base: str | None = None) -> tuple[Any, Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(path))
    tokenizer, model, processor, _ = load_pretrained_model(str(path), base, name, device="cpu", device_map="cpu")
    return tokenizer, model, processor


@pytest.mark.parametrize(("tower", "connector", "mode", "count", "side"), PAIRS)
def test_a_pair_trains_saves_loads_generates_and_resumes(
    tiny: TinyLlava,
    towers: TinyTowers,
    tmp_path: Path,
    tower: str,
    connector: str,
    mode: str,
    count: int,
    side: int | None,
) -> None:
    output = tmp_path / "llava-pair"
    flags = {"vision_tower": name_of(towers, tower), "mm_projector_type": connector, "tuning_mode": mode}
    losses = trained(tiny, output, flags | ({"mores_tokens": "all"} if mode == "mores" else {}))
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)

    tensors = load_file(output / "adapter_model.safetensors")
    projector = locate(str(output)).read().section(EXTRA)
    _, model, processor = loaded(output)
    own = {name: value for name, value in model.named_parameters() if "mm_projector" in name}
    assert own.keys() == projector.keys(), "the connector is stored with the adapter, whole"
    for name, value in own.items():
        assert torch.equal(value, projector[name].to(value.dtype))
    tokens = of_model(model)
    assert tokens is not None and (tokens.count, tokens.side) == (count, side)
    assert PromptTokens.of_model(model).of_image((80, 48)) == count

    seen: list[int] = []

    def count_visual(*_: Any) -> None:
        scope = current()
        if scope is not None and scope.this_pass is not None and not scope.this_pass.decode:
            seen.append(int(scope.this_pass.visual.sum()))

    handle = model.get_model().layers[0].register_forward_hook(count_visual)
    ids = ids_of([1, *words(3), IMAGE, *words(4)])
    pixels = pictures(1).half()
    with torch.inference_mode():
        answer = model.generate(ids, images=pixels, max_new_tokens=4, do_sample=False)
        again = model.generate(ids, images=pixels, max_new_tokens=4, do_sample=False)
    handle.remove()
    assert torch.equal(answer, again) and seen == [count, count], "the token map follows the connector"
    if side is None:
        with pytest.raises(SteeringError, match="tokens that have no place in it"):
            patch_grid((56, 56), count, 1, model, processor)
    else:
        grid = patch_grid((56, 56), count, 1, model, processor)
        assert (grid.rows, grid.columns, grid.first) == (side, side, 0)

    resumed = tmp_path / "llava-resumed"
    shutil.copytree(output / "checkpoint-1", resumed / "checkpoint-1")
    trained(tiny, resumed, flags | ({"mores_tokens": "all"} if mode == "mores" else {}))
    for name, tensor in load_file(resumed / "adapter_model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), f"{name}: a resumed training ends elsewhere"


def test_config_json_says_what_the_checkpoint_needs(tiny: TinyLlava, towers: TinyTowers, tmp_path: Path) -> None:
    """Upstream's stage 1, without a mode; then its mm_projector.bin in a training with MoReS, and in a pool."""
    first = tmp_path / "llava-stage-1"
    parts = {"vision_tower": towers.dinov2, "mm_projector_type": QFORMER}
    trained(tiny, first, {**stage_1_overrides(tiny), **parts, "save_strategy": "no"})
    described = json.loads((first / "config.json").read_text())
    assert described["mm_vision_tower"] == towers.dinov2 and described["mm_projector_type"] == QFORMER
    assert described["mm_components"] == {
        "mm_vision_tower": {"name": "dinov2", "package": "llava-steering-plugin"},
        "mm_projector_type": {"name": "qformer", "package": "llava-steering-plugin"},
    }
    weights = torch.load(first / "mm_projector.bin", weights_only=True)
    assert any(name.endswith("mm_projector.queries") for name in weights)

    second = tmp_path / "llava-stage-2"
    whole = {**parts, "pretrain_mm_mlp_adapter": first / "mm_projector.bin", "save_strategy": "no"}
    trained(tiny, second, {**whole, "tuning_mode": "mores", "freeze_mm_mlp_adapter": True})
    kept = locate(str(second)).read().section(EXTRA)
    for name, value in weights.items():
        assert torch.equal(kept[name.removeprefix("base_model.")].float(), value.float())


def test_adapters_with_connectors_of_their_own_share_a_pool(
    tiny: TinyLlava, towers: TinyTowers, tmp_path: Path
) -> None:
    parts = {"vision_tower": towers.siglip, "mm_projector_type": "pixel-shuffle", "save_strategy": "no"}
    base = tmp_path / "llava-full"
    trained(tiny, base, parts)
    same = {"vision_tower": towers.siglip, "mm_projector_type": "pixel-shuffle", "save_strategy": "no"}
    for name, seed in (("one", 1), ("two", 2)):
        own = {"model_name_or_path": base, "tuning_mode": "mores", "mores_tokens": "all", "learning_rate": 0.02}
        trained(tiny, tmp_path / f"llava-{name}", {**same, **own, "seed": seed})
    tokenizer, model, _ = loaded(base)
    model.float().get_vision_tower().float()
    pool = AdapterPool(model, tokenizer)
    for name in ("one", "two"):
        pool.load(name, tmp_path / f"llava-{name}")
    ids = ids_of([1, IMAGE, *words(4)], [1, IMAGE, *words(4)])
    image = pictures(1).repeat(2, 1, 1, 1)
    with torch.inference_mode():
        together = model(ids, images=image, adapter_names=["one", "two"]).logits
    for row, name in enumerate(("one", "two")):
        with torch.inference_mode():
            alone = model(ids[:1], images=image[:1], adapter_names=name).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("connector", ["mlp2x_gelu", "qformer:queries=5,layers=1,hidden=16,heads=2"])
def test_tiles_of_an_image_are_laid_out_and_counted(tiny: TinyLlava, towers: TinyTowers, connector: str) -> None:
    tower = {"mm_vision_tower": towers.siglip, "mm_hidden_size": 48, "mm_projector_type": connector}
    merge = {} if connector == "mlp2x_gelu" else {"mm_patch_merge_type": "flat"}
    model = load_llava(tiny.llm, **{**ANYRES, **tower, "mm_vision_select_layer": -2, **merge})
    ids = ids_of([1, IMAGE, *words(3)])
    tiles = pictures(3)[None]
    spliced = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, tiles, [(80, 48)])[4]
    assert PromptTokens.of_model(model).of_image((80, 48)) == spliced.shape[1] - 4
    assert (spliced.shape[1] - 4 == 3 * 5) == bool(merge)


def test_a_checkpoint_of_a_component_that_is_not_installed_says_who_brings_it(tiny: TinyLlava, tmp_path: Path) -> None:
    from llava.model.builder import load_pretrained_model

    folder = tmp_path / "llava-foreign"
    shutil.copytree(tiny.llava, folder)
    config = json.loads((folder / "config.json").read_text())
    record = {"mm_projector_type": {"name": "spiral", "package": "llava-spirals"}}
    config |= {"mm_projector_type": "spiral:turns=3", "mm_components": record}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not opened")
    with pytest.raises(ArgumentsError, match="connector 'spiral' of the package 'llava-spirals'"):
        load_pretrained_model(str(folder), None, "llava", device="cpu")
