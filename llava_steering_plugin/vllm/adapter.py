"""Reads a MoReS adapter as what vLLM's slots take: for each layer M, b, R and a selection of tokens.

And the linears of a projector that is its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.fit.compatibility import mode_of
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA, AdapterFolder, StoredAdapter
from llava_steering_plugin.errors import AdapterError, ArgumentsError, listing
from llava_steering_plugin.hooks.parameter_names import ONE_LINEAR, PARTS, PROJECTOR_PATH, of_one_linear
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.modes.mores_choice import chosen_by_layer
from llava_steering_plugin.modes.mores_frames import orthonormal
from llava_steering_plugin.modes.mores_selection import TokenSelection, parse_choices
from llava_steering_plugin.vllm.copies import copy_of, digest_of
from llava_steering_plugin.vllm.token_table import table_of

_MARK = re.compile(
    r"(?P<path>.+)#llava_steering=(?P<digest>[0-9a-f]{32})\.(?P<turn>\d{1,18})(?P<own>\+projector)?", re.DOTALL
)
_INSTEAD = "serve it with `llava-steering serve`, without --engine"
# Of a projector of LLaVA's, by their names in an adapter's file; the first of them may be all of it.
LINEARS = tuple(f"{PROJECTOR_PATH}.{number}" for number in PARTS.values())


@dataclass(frozen=True)
class SlotLayer:
    """The parameters of one layer, in CPU memory.

    Attributes:
        shift, basis: M and R, float32 [rank, D].
        offset: b, float32 [rank].
        selection: number of its selection in the adapter's table.
    """

    shift: Tensor
    offset: Tensor
    basis: Tensor
    selection: int


@dataclass(frozen=True)
class SlotAdapter:
    """An adapter for a slot.

    Attributes:
        layers: by their path below the decoder, such as `layers.3`; layers that it does not steer are not there.
        table: of its selections, as `token_table.table_of` writes them.
        projector: its first and its second linear, each [out, in + 1] in any dtype, with the bias behind the weight;
            None where that is the base's.
    """

    layers: Mapping[str, SlotLayer]
    table: Tensor
    projector: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def size(self) -> int:
        """Bytes that its tensors take."""
        steering = [part for each in self.layers.values() for part in (each.shift, each.offset, each.basis)]
        return sum(part.nbytes for part in (*steering, *self.projector) if part is not None)


def marked(folder: str | os.PathLike[str], digest: str, turn: int = 0, *, own_projector: bool = False) -> str:
    """Return the path of an adapter with the hash of its contents: vLLM's prefix cache tells adapters by their path.

    Args:
        turn: the number of this loading: of two that vLLM knows by one number, the later one counts.
        own_projector: it has one, which the mark says too.
    """
    return f"{folder}#llava_steering={digest}.{turn}{'+projector' if own_projector else ''}"


def unmarked(path: str) -> tuple[str, str | None]:
    """Return the folder and the hash in a path; None where it has none."""
    found = _MARK.fullmatch(path)
    return (found["path"], found["digest"]) if found else (path, None)


def turn_of(path: str) -> int:
    """Return the number of the loading in a marked path."""
    found = _MARK.fullmatch(path)
    assert found is not None
    return int(found["turn"])


def name_of_features(path: str) -> str | None:
    """Return what tells the image features of an adapter from those of others: "" where they are the base's.

    Args:
        path: of any LoRA; None comes back for those that are not ours.
    """
    found = _MARK.fullmatch(path)
    return None if found is None else found["digest"] if found["own"] else ""


def read_marked(folder: str | os.PathLike[str], digest: str | None = None) -> tuple[StoredAdapter, str]:
    """Read an adapter whole, and return it with the hash of its contents.

    Args:
        digest: that it must have; None: any.

    Raises:
        AdapterError: not ours, damaged, or changed: before the reading, where `digest` is given, or while it was read.
    """
    before = digest_of(folder)
    stored = AdapterFolder(folder).read()
    if digest_of(folder) != before:
        raise AdapterError(f"{folder} changed while it was read: something is writing to it. Load it again.")
    if digest not in (None, before):
        raise AdapterError(
            f"{folder} holds another adapter than the one that was checked: it has been replaced since. Load it again "
            "(POST /v1/load_lora_adapter with load_inplace, or a new LoRARequest with another id)."
        )
    return stored, before


def read_checked(folder: str | os.PathLike[str], digest: str) -> StoredAdapter:
    """Read the adapter of that hash whole: from its folder, or from the copy that was made when it was checked.

    Raises:
        AdapterError: neither holds it.
    """
    try:
        return read_marked(folder, digest)[0]
    except AdapterError:
        copied = copy_of(digest)
        if copied is None or not copied.is_dir():
            raise
        return read_marked(copied, digest)[0]


def unsupported_by(config: AdapterConfig) -> list[str]:
    """List what an adapter is that cannot run in vLLM, by its config alone, one clause each."""
    if config.mode == MixLoRA.name:
        return [
            "it is a MixLoRA, which chooses its factors by the mean of the whole prompt, and vLLM computes prompts "
            f"in chunks and takes parts of them from its cache; {_INSTEAD}"
        ]
    if config.mode != MoReS.name:
        return [f"its mode is {config.mode}, and MoReS alone runs in vLLM; {_INSTEAD}"]
    problems = []
    if (modality := config.settings.get("modality", "vis")) != "vis":
        problems.append(f"it steers {modality}, and vLLM knows the places of image tokens alone; {_INSTEAD}")
    if config.added_tokens:
        problems.append(f"it adds tokens to the vocabulary ({', '.join(config.added_tokens)}); {_INSTEAD}")
    return problems


def unsupported(stored: StoredAdapter) -> list[str]:
    """List what an adapter has that cannot run in vLLM, one clause each."""
    problems = unsupported_by(stored.config)
    if stored.config.mode != MoReS.name:
        return problems
    if others := linears_and_others(stored)[1]:
        problems.append(f"it brings parts of the model ({', '.join(others)}); {_INSTEAD}")
    if not problems:
        try:
            for_slot(stored)
        except ArgumentsError as error:
            problems.append(str(error))
    return problems


def for_slot(stored: StoredAdapter) -> SlotAdapter:
    """Return the parameters of an adapter that `unsupported` has nothing against.

    Raises:
        ArgumentsError: its selections are too many, or too long.
    """
    mode = mode_of(stored.config)
    assert isinstance(mode, MoReS)
    tensors = stored.section(ADAPTER)
    suffix = ".vis.steer_basis"
    paths = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    options = parse_choices(mode.tokens)
    chosen = chosen_by_layer(tensors, options).get("vis", {})
    used = dict.fromkeys(chosen.get(path, options[0].spec) for path in paths)
    numbers = {spec: number for number, spec in enumerate(used)}
    layers = {}
    for path in paths:
        raw = tensors[path + suffix].float()
        layers[path] = SlotLayer(
            tensors[f"{path}.vis.steer_shift"].float(),
            tensors[f"{path}.vis.steer_offset"].float(),
            orthonormal(raw).basis,
            numbers[chosen.get(path, options[0].spec)],
        )
    table = table_of([TokenSelection.parse(spec) for spec in used])
    return SlotAdapter(layers, table, _projector(stored))


def linears_and_others(stored: StoredAdapter) -> tuple[list[str], list[str]]:
    """Return which of LINEARS an adapter brings whole, and the names of all else of the model that it brings."""
    names = {of_one_linear(name) for name in stored.section(EXTRA)}
    whole = [path for path in LINEARS if {f"{path}.{leaf}" for leaf in ONE_LINEAR} <= names]
    return whole, sorted(names - {f"{path}.{leaf}" for path in whole for leaf in ONE_LINEAR})


def _projector(stored: StoredAdapter) -> tuple[Tensor | None, Tensor | None]:
    extras = {of_one_linear(name): value for name, value in stored.section(EXTRA).items()}
    whole, _ = linears_and_others(stored)
    first, second = (
        torch.cat([extras[f"{path}.weight"], extras[f"{path}.bias"][:, None]], 1) if path in whole else None
        for path in LINEARS
    )
    return first, second


def refuse_all(problems: list[str], name: str, folder: Any) -> None:
    """Raise one error for all that is wrong with an adapter, if anything is.

    Raises:
        AdapterError: something is.
    """
    if problems:
        raise AdapterError(listing(f"the adapter {name!r} in {folder} cannot run in this vLLM", problems))
