"""`llava-steering convert`: the authors' checkpoints give their own logits, and land where they should.

Holds for `convert/conversion.py`, `convert/layouts.py`, `convert/released.py`, `convert/mores.py` and
`convert/mixlora.py`.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from released_checkpoints import (
    GOLDEN,
    METHODS,
    RANK,
    edit_json,
    golden,
    golden_base,
    inner,
    layer_file,
    mixlora_over,
    refusal,
    said,
    same_adapter,
)
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava
from transformers import LlamaForCausalLM

from llava_steering_plugin import load_adapter, remove, token_map
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.adapters.stored.folder import ADAPTER, CARD, CONFIG, EXTRA, LLAVA_CONFIG, WEIGHTS
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.convert import conversion
from llava_steering_plugin.convert.conversion import Conversion, convert
from llava_steering_plugin.errors import AdapterError

# The authors' numbers


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_checkpoint_gives_the_logits_of_the_authors_code(
    converted: dict[str, Conversion], method: str
) -> None:
    golden_io = load_file(GOLDEN / f"{method}_released_io.safetensors")
    model = LlamaForCausalLM.from_pretrained(golden_base(method)).eval()
    embeds = golden_io["inputs_embeds"]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    if method == "mores":
        start = int(golden_io["visual_start"])
        visual[:, start : start + int(golden_io["visual_len"])] = True
    load_adapter(model, converted[method].folder)
    with torch.no_grad(), token_map(visual):
        logits = model(inputs_embeds=embeds).logits
    assert (golden_io["logits"] - golden_io["base_logits"]).abs().max() > 1e-2, "the golden data would show nothing"
    torch.testing.assert_close(logits, golden_io["logits"], atol=1e-5, rtol=0)
    remove(model)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, golden_io["base_logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_an_adapter_of_its_own_size_without_any_pickle(
    converted: dict[str, Conversion], method: str
) -> None:
    done = converted[method]
    stored = read(done.folder)
    assert stored.config == done.config and stored.config.mode == method
    assert sorted(path.name for path in done.folder.iterdir()) == sorted([WEIGHTS, CONFIG, LLAVA_CONFIG, CARD])
    assert sum(value.numel() for value in stored.section(ADAPTER).values()) == done.parameters
    assert not stored.section(EXTRA)
    assert done.size == (done.folder / WEIGHTS).stat().st_size < 4 * done.parameters + 20_000
    assert LlamaForCausalLM.config_class.from_pretrained(done.folder).num_hidden_layers > 1


def test_settings_are_the_checkpoints(converted: dict[str, Conversion]) -> None:
    mores, mixlora = (converted[method].config.settings for method in METHODS)
    assert (mores["rank"], mores["tokens"], mores["modality"], mores["layers"]) == (2, "f4+l5", "vis", "0-2")
    given = {"factors": 8, "rank": 2, "alpha": 16, "dropout": 0.05, "conditional": True, "variant": "released"}
    assert given.items() <= mixlora.items()


def test_what_is_lost_is_said(converted: dict[str, Conversion]) -> None:
    mores = said(converted["mores"])
    for entry in (
        "dropout: 0.05",
        "intervened_prompt_part: 'first_round'",
        "text-only samples",
        "img_embed_token_len: 20",
    ):
        assert entry in mores
    assert "attribute_dim: 32" in said(converted["mixlora"])
    assert all("conversation template" in said(done) for done in converted.values())


def test_independent_selection_gives_what_a_slow_sum_over_the_chosen_factors_gives(
    tiny: TinyLlava, tmp_path: Path
) -> None:
    mixlora_over(tiny.llm, tmp_path / "whole", {})
    held = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    done = convert(tmp_path / "whole", tmp_path / "adapter")
    assert done.config.settings["conditional"] is False and done.config.settings["ifs_weight"] == 1
    model = LlamaForCausalLM.from_pretrained(tiny.llm, torch_dtype=torch.float32).eval()
    load_adapter(model, done.folder)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    linear.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad(), token_map(torch.zeros(3, 11, dtype=torch.bool)):
        model(input_ids=torch.randint(3, 300, (3, 11)))
    (hidden, output), name = seen[0], "base_model.model.model.layers.1.mlp.up_proj."
    expected = hidden @ held[name + "weight"].float().T
    for row in range(3):
        routers = (held[f"{name}cmoa_selector.lora{side}_selector.weight"] for side in "AB")
        scores_a, scores_b = (router @ hidden[row].mean(0) for router in routers)
        for a, b in zip(scores_a.topk(RANK).indices, scores_b.topk(RANK).indices, strict=True):
            narrow = hidden[row] @ held[f"{name}lora_A.default.{a}"].T
            expected[row] += 8 / RANK * narrow @ held[f"{name}lora_B.default.{b}"]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)


# Where things lie


def test_the_inner_folder_of_mores_does_as_well_as_the_outer(
    converted: dict[str, Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(inner(golden("mores")), tmp_path / "one", golden_base("mores"))
    assert same_adapter(tmp_path / "one", converted["mores"].folder)
    monkeypatch.chdir(inner(golden("mores")))
    convert(".", tmp_path / "two", golden_base("mores"))
    assert same_adapter(tmp_path / "two", converted["mores"].folder)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_weights_in_shards_or_safetensors_give_the_same_adapter(
    converted: dict[str, Conversion], released: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = released("mixlora")
    whole = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    if kind == "safetensors":
        save_file(whole, folder / "model.safetensors")
    else:
        shards = [f"pytorch_model-0000{number}-of-2.bin" for number in (1, 2)]
        placed = {name: shards[place % 2] for place, name in enumerate(whole)}
        for shard in shards:
            torch.save({name: whole[name] for name, file in placed.items() if file == shard}, folder / shard)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
        without = folder / shards[1]
        without.rename(folder / "away")
        assert shards[1] in refusal(folder, golden_base("mixlora"))
        (folder / "away").rename(without)
    convert(folder, tmp_path / "done", golden_base("mixlora"))
    assert same_adapter(tmp_path / "done", converted["mixlora"].folder)


def test_an_index_cannot_point_out_of_its_folder(released: Callable[[str], Path]) -> None:
    folder = released("mixlora")
    (folder / "pytorch_model.bin").rename(folder.parent / "outside.bin")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "weight_map" in refusal(folder, golden_base("mixlora"))


def test_the_older_formats_of_torch_pickles_are_read_too(
    converted: dict[str, Conversion], released: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = released("mores")
    for number in range(3):
        tensors = torch.load(layer_file(folder, number), weights_only=True)
        torch.save(tensors, layer_file(folder, number), _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "done", golden_base("mores"))
    assert same_adapter(tmp_path / "done", converted["mores"].folder)


# Selections


@pytest.mark.parametrize(
    ("count", "length", "misses"), [(5, 21, False), (9, 576, True), (4, 20, True), (30, 20, False)]
)
def test_uniform_positions_are_converted_and_said_where_they_miss_the_end(
    released: Callable[[str], Path], tmp_path: Path, count: int, length: int, misses: bool
) -> None:
    folder = released("mores")
    positions = inner(folder) / "mores_pos_configs.json"
    edit_json(positions, intervention_positions=f"uniform{count}", img_embed_token_len=length)
    done = convert(folder, tmp_path / "done", golden_base("mores"))
    assert done.config.settings["tokens"] == f"uniform{count}"
    assert ("OTHER TOKENS" in said(done)) is misses
    if misses:
        interval = (length - 1) // (count - 1)
        assert f"number {interval * (count - 1) + 1} of {length}" in said(done)


@pytest.mark.parametrize(("given", "tokens"), [("f0+l5", "l5"), ("f3+l0", "f3"), ("f04+l05", "f4+l5")])
def test_edges_of_no_token_are_left_out(
    released: Callable[[str], Path], tmp_path: Path, given: str, tokens: str
) -> None:
    folder = released("mores")
    edit_json(inner(folder) / "mores_pos_configs.json", intervention_positions=given)
    assert convert(folder, tmp_path / "done", golden_base("mores")).config.settings["tokens"] == tokens


def test_an_adapter_on_some_layers_stays_on_these(
    converted: dict[str, Conversion], released: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = released("mores")
    described = inner(folder) / "intervention_config.json"
    entries = json.loads(described.read_text())["representations"]
    edit_json(described, representations=[entries[2], entries[0]])
    edit_json(inner(folder) / "mores_pos_configs.json", num_interventions={"llm": 2})
    layer_file(folder, 1).unlink()
    done = convert(folder, tmp_path / "done", golden_base("mores"))
    assert done.config.settings["layers"] == "0,2"
    assert "layers: 2 of the base's 3 are steered" in said(done) and "are steered" not in said(converted["mores"])
    assert {name.split(".")[2] for name in read(done.folder).tensors if name.startswith(ADAPTER)} == {
        "0",
        "2",
    }


# The target


def test_a_target_that_is_not_empty_is_left_alone(converted: dict[str, Conversion], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    for force, reason in ((False, "is not empty"), (True, "something else than an adapter")):
        with pytest.raises(AdapterError, match=reason):
            convert(golden("mores"), tmp_path / "full", golden_base("mores"), force=force)
    assert (tmp_path / "full" / "config.json").read_text() == "mine"
    for target in (tmp_path / "full" / "config.json", tmp_path / "full" / "config.json" / "below"):
        with pytest.raises(AdapterError, match=r"config\.json"):
            convert(golden("mores"), target, golden_base("mores"))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "config.json"]


def test_force_replaces_an_adapter_and_an_empty_folder_needs_none(
    converted: dict[str, Conversion], tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    convert(golden("mores"), tmp_path / "target", golden_base("mores"))
    (tmp_path / "target" / "notes.txt").write_text("mine")
    convert(golden("mixlora"), tmp_path / "target", golden_base("mixlora"), force=True)
    assert same_adapter(tmp_path / "target", converted["mixlora"].folder)
    assert (tmp_path / "target" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(
    converted: dict[str, Conversion], tmp_path: Path, force: bool
) -> None:
    target = tmp_path / "target"
    if force:
        shutil.copytree(converted["mores"].folder, target)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(AdapterError, match="could not be written"):
            convert(golden("mixlora"), target, golden_base("mixlora"), force=force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if force else [])
    assert not force or same_adapter(target, converted["mores"].folder)


def test_an_adapter_that_does_not_read_back_as_it_was_written_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = conversion.write_folder

    def faulty(folder: Path, config: AdapterConfig, tensors: Mapping[str, torch.Tensor], *rest: str) -> None:
        first = min(tensors)
        flipped = tensors[first].clone()
        flipped.view(torch.int32)[(0,) * flipped.dim()] ^= 1  # the last bit of one value
        write(folder, config, {**tensors, first: flipped}, *rest)

    monkeypatch.setattr(conversion, "write_folder", faulty)
    with pytest.raises(AdapterError, match=r"(?s)does not read back.*adapter\.layers\.0"):
        convert(golden("mixlora"), tmp_path / "done", golden_base("mixlora"))
    assert not list(tmp_path.iterdir())
