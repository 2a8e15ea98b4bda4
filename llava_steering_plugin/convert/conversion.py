"""Converts one of the authors' released checkpoints to an adapter folder, which is read back at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.adapters.fit.compatibility import build
from llava_steering_plugin.adapters.fit.values import too_large, unsound
from llava_steering_plugin.adapters.parameters import parameters_of
from llava_steering_plugin.adapters.stored.card import model_card
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA, WEIGHTS, AdapterFolder
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.adapters.stored.writing import write_folder
from llava_steering_plugin.convert.backbone import Backbone, find_backbone
from llava_steering_plugin.convert.layouts import read_released
from llava_steering_plugin.convert.released import Note, Released
from llava_steering_plugin.errors import AdapterError, BaseMismatch, Problems, listing
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.modes.base import build_modules


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        folder: the adapter.
        config: its config.
        parameters: of the mode.
        size: of the weights file, in bytes.
        extras: names of the model's own tensors that it carries.
        checks: what was verified.
        notes: what was not carried over.
    """

    folder: Path
    config: AdapterConfig
    parameters: int
    size: int
    extras: tuple[str, ...]
    checks: tuple[str, ...]
    notes: tuple[Note, ...]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    base: str | None = None,
    *,
    projector: bool = True,
    conversation: str | None = None,
    force: bool = False,
    problems: Problems | None = None,
) -> Conversion:
    """Write the released checkpoint in `source` as an adapter folder to `target`.

    Args:
        source: folder of the checkpoint.
        target: new or empty folder.
        base: the model that it was trained on, folder or hub id; None: what the checkpoint itself names.
        projector: take along the checkpoint's projector, where the base lacks it or has another one.
        conversation: LLaVA's template that it was trained with; the checkpoints don't say.
        force: replace the adapter in a `target` that is not empty.
        problems: what the caller has found wrong, to be said with the rest.

    Raises:
        SteeringError: anything is wrong with the checkpoint, the base or the target. Nothing has been written then.
    """
    path = Path(target).expanduser().absolute()
    released, backbone = _checked(Path(source).expanduser(), path, base, force, problems or Problems())
    weights = _weights(released, backbone)
    parameters = sum(value.numel() for value in weights.values())
    checks, notes = _compared(released, backbone)
    if conversation is None:
        text = "not in the checkpoint; name it with --conversation, such as vicuna_v1"
        notes.append(Note("conversation template", text))
    extras = backbone.projector(released) if projector else {}
    if released.projector and not projector:
        notes.append(Note("projector", "left out, as asked"))
    added, rows = backbone.vocabulary(released)
    config = AdapterConfig(
        released.mode.name,
        released.mode.settings(),
        backbone.as_config(),
        conversation=conversation,
        added_tokens=added,
        trained_on={"converted from": f"a {released.mode.name} checkpoint of the authors' code"},
    )
    dtype = _dtype(backbone)
    others = {EXTRA + name: value for name, value in extras.items()} | rows
    if beyond := too_large(others, {name: dtype for name, value in others.items() if value.is_floating_point()}):
        raise AdapterError(listing(f"nothing can be computed with the checkpoint in {released.folder}", beyond))
    tensors = weights | others
    card = model_card(config, parameters, sorted(extras))
    _write(path, config, tensors, _llava_config(released, backbone), card, backbone)
    checks.append(f"read back: {len(tensors)} tensors equal to the bit, names and shapes as the base needs them")
    size = (path / WEIGHTS).stat().st_size
    return Conversion(path, config, parameters, size, tuple(sorted(extras)), tuple(checks), tuple(notes))


def _checked(
    source: Path, target: Path, base: str | None, force: bool, problems: Problems
) -> tuple[Released, Backbone]:
    """Return the checkpoint and its base.

    Raises:
        SteeringError: checkpoint, base or target cannot be used; the message names all of them.
    """
    with problems.noted():
        _check_target(target, force)
    released: Released | None = None
    backbone: Backbone | None = None
    with problems.noted():
        released = read_released(source)
    with problems.noted():
        if released is not None:
            backbone = find_backbone(released, base)
        elif base is not None:
            read_config(base)
    problems.raise_any("this cannot be converted")
    assert released is not None and backbone is not None
    return released, backbone


def _check_target(target: Path, force: bool) -> None:
    try:
        if target.exists() and not target.is_dir():
            raise AdapterError(f"{target} is a file. Give a new folder.")
        taken = target.exists() and any(target.iterdir())
    except OSError as error:
        raise AdapterError(f"{target} cannot be looked into: {error}. Give a new folder.") from error
    if taken and not force:
        raise AdapterError(f"{target} is not empty. Give a new folder, or --force to replace the adapter in it.")
    if taken and find(target) is None:
        raise AdapterError(f"{target} holds something else than an adapter, which --force does not replace.")


def _weights(released: Released, backbone: Backbone) -> dict[str, Tensor]:
    """Return the mode's tensors by their full names in the adapter."""
    _, shape = find_decoder(backbone.model)
    if problems := released.mode.problems(shape):
        raise BaseMismatch(listing(f"{released.folder} does not fit the base {backbone.as_config()}", problems))
    modules = build_modules(released.mode, shape)
    released.fill(shape, modules)
    if problems := unsound(released.mode, modules, _dtype(backbone)):
        raise AdapterError(listing(f"nothing can be computed with the checkpoint in {released.folder}", problems))
    return {ADAPTER + name: parameter.detach() for name, parameter in parameters_of(modules).items()}


def _dtype(backbone: Backbone) -> torch.dtype:
    """Return the dtype in which the base computes: upstream loads in float16 whatever its config names, or float32."""
    named = str(backbone.described.get("torch_dtype"))
    return torch.float32 if named == "float32" else torch.float16


def _compared(released: Released, backbone: Backbone) -> tuple[list[str], list[Note]]:
    """Compare the checkpoint with its base; return what was checked, and the notes."""
    checks, notes = [], [*released.notes, *backbone.strangers(released)]
    if backbone.weights is None:
        where = "are not on this machine" if backbone.reached else "are not on this machine, nor is it found on the hub"
        notes.append(Note("base", f"the weights of {backbone.name} {where}, so nothing was compared"))
    elif compared := backbone.compare(released):
        checks.append(f"{compared} tensors of the base in the checkpoint have the values of {backbone.name}")
    return checks, notes


def _llava_config(released: Released, backbone: Backbone) -> str:
    """config.json: the checkpoint's where it describes a LLaVA, else the base's."""
    own = released.config or {}
    chosen = own if "mm_vision_tower" in own else backbone.described
    kept = {key: value for key, value in chosen.items() if key != "quantization_config"}
    return json.dumps(kept, indent=2, sort_keys=True, default=str) + "\n"


def _write(
    target: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], llava: str, card: str, backbone: Backbone
) -> None:
    """Write beside `target`, read it back, and only then put it in place."""
    staged = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        write_folder(staged, config, tensors, llava, card)
        _verify(staged, config, tensors, backbone)
        if target.is_dir() and any(target.iterdir()):
            write_folder(target, config, tensors, llava, card)
        else:
            os.replace(staged, target)
    except OSError as error:
        raise AdapterError(f"the adapter could not be put at {target}: {error}. Choose another folder.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _verify(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Fit what was written to the base's structure, as `load_adapter` will, and compare every value."""
    stored = AdapterFolder(folder).read()
    problems = [] if stored.config == config else ["its config"]
    problems += sorted(tensors.keys() ^ stored.tensors.keys())
    common = sorted(tensors.keys() & stored.tensors.keys())
    problems += [name for name in common if not torch.equal(stored.tensors[name], tensors[name])]
    if problems:
        raise AdapterError(listing("the adapter does not read back as it was written; is the disk sound?", problems))
    # The structure is the language model's alone: a projector has no place in it.
    own = {name: value for name, value in stored.tensors.items() if not name.startswith(EXTRA)}
    with torch.device("meta"):
        build(backbone.model, find_decoder(backbone.model)[1], replace(stored, tensors=own))
