"""Checkpoints in the authors' two layouts: their golden ones, changed ones, and whole ones over any small Llama."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.convert.conversion import Conversion, convert
from llava_steering_plugin.errors import AdapterError, SteeringError

METHODS = ("mores", "mixlora")
GOLDEN = Path(__file__).parents[1] / "golden"
FACTORS, RANK = 4, 2
LINEARS = (".q_proj.weight", ".k_proj.weight", ".v_proj.weight", ".o_proj.weight")
LINEARS += (".gate_proj.weight", ".up_proj.weight", ".down_proj.weight")


def golden(method: str) -> Path:
    """The checkpoint that the authors' code wrote."""
    return GOLDEN / f"{method}_released"


def golden_base(method: str) -> str:
    return str(GOLDEN / f"{method}_base")


def inner(folder: Path) -> Path:
    """Where a MoReS checkpoint keeps its adapter."""
    return folder / "mores" / "language_model"


def layer_file(folder: Path, number: int) -> Path:
    return inner(folder) / f"intkey_layer.{number}.comp.block_output.unit.pos.nunit.1#0.bin"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, **changes: Any) -> None:
    """Replaces tensors of a .bin file; None removes one. Dots in names are written as double underscores."""
    tensors = torch.load(path, weights_only=True)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    torch.save(tensors, path)


def edit_arguments(folder: Path, **changes: Any) -> None:
    """Replaces entries of cmoa_args.bin; None removes one."""
    with torch.serialization.safe_globals([SimpleNamespace]):
        arguments = torch.load(folder / "cmoa_args.bin", weights_only=True)
    for name, value in changes.items():
        if value is None:
            delattr(arguments, name)
        else:
            setattr(arguments, name, value)
    torch.save(arguments, folder / "cmoa_args.bin")


def mixlora_over(base: Path, folder: Path, projector: dict[str, Tensor]) -> None:
    """A whole MixLoRA checkpoint with random factors over a Llama on disk, as the authors' trainer writes it."""
    config = json.loads((base / "config.json").read_text())
    tensors = {name: value.float() for name, value in load_file(base / "model.safetensors").items()} | projector
    tensors["model.vision_tower.vision_tower.embeddings.weight"] = torch.zeros(2)
    for name, value in list(tensors.items()):
        if name.endswith(LINEARS):
            linear, (out, width) = name.removesuffix(".weight"), value.shape
            for number in range(FACTORS):
                tensors[f"{linear}.lora_A.default.{number}"] = torch.randn(1, width)
                tensors[f"{linear}.lora_B.default.{number}"] = torch.randn(1, out)
            tensors[f"{linear}.cmoa_selector.loraA_selector.weight"] = torch.randn(FACTORS, width)
            tensors[f"{linear}.cmoa_selector.loraB_selector.weight"] = torch.randn(FACTORS, width)
    folder.mkdir()
    torch.save({f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "pytorch_model.bin")
    arguments = {"cond_type": "input", "n_experts": FACTORS, "n_selected": RANK, "lora_alpha": 8, "lora_dropout": 0.05}
    torch.save(SimpleNamespace(**arguments), folder / "cmoa_args.bin")
    ours = {"model_type": "llava_cmoa", "_name_or_path": str(base), "use_cmoa": True, "cond_type": "input"}
    (folder / "config.json").write_text(json.dumps(config | ours | {"vocab_size": len(tensors["lm_head.weight"])}))


def mores_over(base: Path, folder: Path, projector: dict[str, Tensor], whole: dict[str, Any]) -> None:
    """A whole MoReS checkpoint with random weights over a Llama on disk, as the authors' training writes it."""
    config = json.loads((base / "config.json").read_text())
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    inner(folder).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"llm_model_name_or_path": str(base), **whole}))
    for part, tensors in (("language_model", load_file(base / "model.safetensors")), ("connector", projector)):
        (folder / part).mkdir()
        torch.save(tensors, folder / part / "pytorch_model.bin")
    (folder / "language_model" / "config.json").write_text(json.dumps(config))
    entries = []
    for number in range(layers):
        rotation = torch.linalg.qr(torch.randn(width, RANK)).Q
        parts = {"weight": torch.randn(RANK, width), "bias": torch.randn(RANK), "rotate_layer": rotation}
        torch.save(parts, layer_file(folder, number))
        kind = {"type": "mores", "embed_dim": width, "low_rank_dimension": RANK}
        entries.append({"layer": number, "component": "block_output", "low_rank_dimension": RANK, "intervention": kind})
    (inner(folder) / "intervention_config.json").write_text(json.dumps({"representations": entries}))
    positions = json.loads((inner(golden("mores")) / "mores_pos_configs.json").read_text())
    positions["num_interventions"] = {"llm": layers}
    (inner(folder) / "mores_pos_configs.json").write_text(json.dumps(positions))


def refusal(source: Path, base: str | None, kind: type[SteeringError] = AdapterError, **options: Any) -> str:
    """The message with which a conversion is refused; nothing may be left of it."""
    target = source.parent / "refused"
    with pytest.raises(kind) as refused:
        convert(source, target, base, **options)
    assert not [path.name for path in source.parent.iterdir() if "refused" in path.name]
    return str(refused.value)


def said(notes: Conversion) -> str:
    return "\n".join(f"{note.entry}: {note.what}" for note in notes.notes)


def same_adapter(one: Path, other: Path) -> bool:
    here, there = read(one).tensors, read(other).tensors
    return here.keys() == there.keys() and all(torch.equal(value, there[name]) for name, value in here.items())
