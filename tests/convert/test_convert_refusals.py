"""Checkpoints that cannot be converted: one error each, which says everything that is wrong, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from released_checkpoints import (
    edit_arguments,
    edit_json,
    edit_tensors,
    golden,
    golden_base,
    inner,
    layer_file,
    refusal,
)

from llava_steering_plugin.convert.conversion import Conversion, convert
from llava_steering_plugin.errors import AdapterError, SteeringError

Q_PROJ = "base_model__model__model__layers__1__self_attn__q_proj"
Spoil = Callable[[Path], Any]


def positions(**changes: Any) -> Spoil:
    return lambda folder: edit_json(inner(folder) / "mores_pos_configs.json", **changes)


def layers(**changes: Any) -> Spoil:
    """Changes the middle one of the described layers; what is not its own entry belongs to its intervention."""

    def spoil(folder: Path) -> None:
        path = inner(folder) / "intervention_config.json"
        entries = json.loads(path.read_text())["representations"]
        for key, value in changes.items():
            (entries[1] if key in entries[1] else entries[1]["intervention"])[key] = value
        path.write_text(json.dumps({"representations": entries}))

    return spoil


def shortened(path: Callable[[Path], Path]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = path(folder).read_bytes()
        path(folder).write_bytes(content[: len(content) // 2])

    return spoil


def spanning_disks(path: Path) -> None:
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + bytes(4) + bytes(8) + (2).to_bytes(4, "little")
    path.write_bytes(content[:end] + locator + content[end:])


def selector(folder: Path) -> None:
    name = f"{Q_PROJ}__cmoa_loarB_extra_selector__loraA_param2loraB_selector__weight"
    edit_tensors(folder / "pytorch_model.bin", **{name: torch.zeros(8, 64)})


def without_layer_1(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    whole = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in whole.items() if ".layers.1." not in name or ".lora_" not in name}, path)


BAD_MORES: dict[str, tuple[Spoil, str]] = {
    "a layer's file missing": (lambda folder: layer_file(folder, 1).unlink(), "layer 1: its intkey_ file is missing"),
    "no layer's file": (lambda folder: [layer_file(folder, n).unlink() for n in range(3)], "(?s)layer 0.*1.*2"),
    "a layer's file too many": (
        lambda folder: shutil.copy(layer_file(folder, 0), layer_file(folder, 7)),
        "intkey_layer.7.*does not list",
    ),
    "a file cut short": (shortened(lambda folder: layer_file(folder, 2)), "layer.2.*cannot be read"),
    "a file empty": (lambda folder: layer_file(folder, 0).write_bytes(b""), "layer.0.*cannot be read"),
    "a file of text": (lambda folder: layer_file(folder, 0).write_text("hello"), "layer.0.*cannot be read"),
    "a file that is a list": (lambda folder: torch.save([1], layer_file(folder, 0)), "holds a list"),
    "a file with a number": (lambda folder: torch.save({"weight": 1}, layer_file(folder, 0)), "no tensors: weight"),
    "another kind's tensors": (
        lambda folder: torch.save({"proj_layer.weight": torch.zeros(2, 64)}, layer_file(folder, 0)),
        "holds proj_layer.weight, not rotate_layer",
    ),
    "values not finite": (
        lambda folder: edit_tensors(layer_file(folder, 0), bias=torch.tensor([0.0, float("nan")])),
        "bias has values that are NaN",
    ),
    "values beyond float32": (
        lambda folder: edit_tensors(layer_file(folder, 1), weight=torch.full((2, 64), 1e300, dtype=torch.float64)),
        "(?s)nothing can be computed with the checkpoint in.*steer_shift or steer_offset: .* overflows",
    ),
    "a wrong shape": (
        lambda folder: edit_tensors(layer_file(folder, 0), weight=torch.zeros(2, 32)),
        r"layer 0: weight is \[2, 32\] where the base needs \[2, 64\]",
    ),
    "columns that are not orthonormal": (
        lambda folder: edit_tensors(layer_file(folder, 0), rotate_layer=torch.ones(64, 2)),
        "(?s)orthonormal.*layer 0",
    ),
    "absurd numbers": (
        positions(intervention_positions="uniform" + "9" * 5000, img_embed_token_len=10**30),
        "intervention_positions",
    ),
    "columns all zero": (
        lambda folder: edit_tensors(layer_file(folder, 0), rotate_layer=torch.zeros(64, 2)),
        "(?s)orthonormal.*layer 0",
    ),
    "positions cut short": (shortened(lambda folder: inner(folder) / "mores_pos_configs.json"), "pos_configs.*read"),
    "positions missing": (lambda folder: (inner(folder) / "mores_pos_configs.json").unlink(), "pos_configs.*missing"),
    "layers cut short": (shortened(lambda folder: inner(folder) / "intervention_config.json"), "config.json.*read"),
    "layers missing": (lambda folder: (inner(folder) / "intervention_config.json").unlink(), "config.json.*missing"),
    "layers nested without end": (
        lambda folder: (inner(folder) / "intervention_config.json").write_text("[" * 100_000),
        "config.json cannot be read",
    ),
    "layers no list": (
        lambda folder: edit_json(inner(folder) / "intervention_config.json", representations={}),
        "lists no layers",
    ),
    "two selections": (
        lambda folder: (inner(folder) / "mores_pos_configs.json").write_text("[{}, {}]"),
        "2 selections",
    ),
    "unknown positions": (positions(intervention_positions="middle"), "'middle'"),
    "no position": (positions(intervention_positions="f0+l0"), r"'f0\+l0'"),
    "one uniform position": (positions(intervention_positions="uniform1"), "'uniform1'"),
    "text": (positions(intervene_modality="vis+text"), r"'vis\+text'.*only 'vis'"),
    "weights not shared": (positions(mores_share_weights=False), "first half of the layers"),
    "no image length": (positions(img_embed_token_len=None), "img_embed_token_len is None"),
    "another number of layers": (positions(num_interventions={"llm": 4}), "is 4 and .* lists 3"),
    "everything at once": (
        positions(intervention_positions="x", intervene_modality="text", mores_share_weights=None),
        "(?s)positions.*modality.*share_weights",
    ),
    "another place": (layers(component="mlp_output"), "layer 1 is steered at 'mlp_output'"),
    "another type": (layers(type="norot_mores"), "layer 1 is of type 'norot_mores'"),
    "an activation": (layers(act_fn="relu"), "layer 1 applies 'relu'"),
    "several ranks": (layers(low_rank_dimension=4), "ranks 2, 4"),
    "a layer twice": (layers(layer=0), "layer 0 is listed twice"),
    "a layer of no number": (layers(layer="all"), "entry 1 lacks a usable layer"),
}
BAD_MIXLORA: dict[str, tuple[Spoil, str]] = {
    "weights cut short": (shortened(lambda folder: folder / "pytorch_model.bin"), "pytorch_model.bin cannot be read"),
    "arguments cut short": (shortened(lambda folder: folder / "cmoa_args.bin"), "cmoa_args.bin cannot be read"),
    "arguments whose archive is said to span disks": (
        # 20 bytes before the end record, the mark of a zip64 locator; then its number of disks.
        lambda folder: spanning_disks(folder / "cmoa_args.bin"),
        "cmoa_args.bin cannot be read",
    ),
    "arguments a table": (lambda folder: torch.save({}, folder / "cmoa_args.bin"), "holds a dict"),
    "config cut short": (shortened(lambda folder: folder / "config.json"), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "pytorch_model.bin").unlink(), "has cmoa_args.bin but no weights"),
    "the base's weights": (
        lambda folder: torch.save({"model.norm.weight": torch.ones(64)}, folder / "pytorch_model.bin"),
        "no factors of MixLoRA",
    ),
    "a folder for a file": (
        lambda folder: (folder / "pytorch_model.bin").unlink() or (folder / "pytorch_model.bin").mkdir(),
        "pytorch_model.bin cannot be read .*directory",
    ),
    "a wrong W_AB": (selector, r"q_proj.*loraA_param2loraB_selector.weight is \[8, 64\] where \[8, 128\] is needed"),
    "a factor missing": (
        lambda folder: edit_tensors(folder / "pytorch_model.bin", **{f"{Q_PROJ}__lora_A__default__3": None}),
        "q_proj: lora_A.default.3: missing",
    ),
    "a factor too many": (
        lambda folder: edit_tensors(
            folder / "pytorch_model.bin", **{f"{Q_PROJ}__lora_A__default__8": torch.zeros(1, 64)}
        ),
        "q_proj: lora_A.default.8: without a place",
    ),
    "a layer missing": (without_layer_1, "(?s)layers.1.*q_proj: lora_A.default.0.*13 more.*: missing.*down_proj: "),
    "values not finite": (
        lambda folder: edit_tensors(
            folder / "pytorch_model.bin", **{f"{Q_PROJ}__lora_A__default__1": torch.full((1, 64), float("inf"))}
        ),
        "q_proj.lora_A.default.1 has values that are NaN",
    ),
    "values beyond float32": (
        lambda folder: edit_tensors(
            folder / "pytorch_model.bin",
            **{f"{Q_PROJ}__lora_A__default__1": torch.full((1, 64), 1e300, dtype=torch.float64)},
        ),
        "(?s)nothing can be computed with the checkpoint in.*q_proj.routed_a: its products .* overflow",
    ),
    "a scale beyond float32": (lambda folder: edit_arguments(folder, lora_alpha=1e308), "within float32"),
    "independent settings over conditional tensors": (
        lambda folder: edit_arguments(folder, cond_type="input"),
        "(?s)loraB_selector.weight: missing.*without a place",
    ),
    "another condition": (lambda folder: edit_arguments(folder, cond_type="task_embed"), "'task_embed'; only input"),
    "no condition": (lambda folder: edit_arguments(folder, cond_type=None), "cond_type is 'None'"),
    "a projector with factors": (lambda folder: edit_arguments(folder, mix_mm_projector=True), "mix_mm_projector is T"),
    "weighted factors": (lambda folder: edit_arguments(folder, used_scored_weight=True), "weighted by their scores"),
    "plain layers first": (lambda folder: edit_arguments(folder, mix_start_layer=2), "mix_start_layer is 2"),
    "trained biases": (lambda folder: edit_arguments(folder, lora_bias="all"), "lora_bias is 'all'"),
    "no rank": (lambda folder: edit_arguments(folder, n_selected=None), "n_selected is None"),
    "more factors than there are": (
        lambda folder: edit_arguments(folder, n_experts=10**8),
        "n_experts .* is 100000000, and no linear has more than 8",
    ),
    "absurd numbers": (
        lambda folder: edit_arguments(folder, lora_alpha=10**400, n_experts=10**30, lora_dropout=float("nan")),
        "(?s)n_experts.*lora_alpha",
    ),
    "a rank of text": (lambda folder: edit_arguments(folder, n_selected="2"), "n_selected is '2'"),
    "more chosen than there are": (lambda folder: edit_arguments(folder, n_selected=9), "mixlora_rank is 9"),
    "several at once": (
        lambda folder: edit_arguments(folder, cond_type="attr", mix_loraA=False, lora_alpha="x"),
        "(?s)cond_type.*mix_loraA.*lora_alpha",
    ),
}


@pytest.mark.parametrize(
    ("method", "spoil", "expected"),
    [
        pytest.param(method, *case, id=f"{method}: {name}")
        for method, cases in (("mores", BAD_MORES), ("mixlora", BAD_MIXLORA))
        for name, case in cases.items()
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_error_that_says_what_is_wrong(
    released: Callable[[str], Path], method: str, spoil: Spoil, expected: str
) -> None:
    folder = released(method)
    spoil(folder)
    message = refusal(folder, golden_base(method))
    assert re.search(expected, message), message
    assert len(message.splitlines()) < 30


def test_both_layouts_in_one_folder_and_neither_are_refused(released: Callable[[str], Path]) -> None:
    folder = released("mores")
    shutil.copy(golden("mixlora") / "cmoa_args.bin", folder)
    assert "both a MoReS checkpoint" in refusal(folder, golden_base("mores"))
    shutil.copy(golden("mixlora") / "cmoa_args.bin", inner(folder))
    with pytest.raises(AdapterError, match="both"):
        convert(inner(folder), folder.parent / "x")
    neither = folder.parent / "neither"
    neither.mkdir()
    assert "no checkpoint of the authors'" in refusal(neither, golden_base("mores"))
    assert "is no folder" in refusal(folder.parent / "absent", golden_base("mores"))
    assert "is no folder" in refusal(folder / "cmoa_args.bin", golden_base("mores"))


def test_an_adapter_of_this_plugin_is_nothing_to_convert(converted: dict[str, Conversion], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is an adapter already"):
        convert(converted["mores"].folder, tmp_path / "again")


@pytest.mark.parametrize("base", ["absent", "empty", "weightless", "adapter", "damaged"])
def test_a_base_that_is_none_is_refused(released: Callable[[str], Path], tmp_path: Path, base: str) -> None:
    folder = tmp_path / base
    if base != "absent":
        folder.mkdir()
    if base in ("weightless", "damaged"):
        shutil.copy(Path(golden_base("mores")) / "config.json", folder)
    if base == "damaged":
        (folder / "model.safetensors").write_bytes(b"\0" * 100)
    if base == "adapter":
        convert(golden("mores"), folder, golden_base("mores"))
    message = refusal(released("mores"), str(folder), SteeringError)
    assert str(folder) in message
