"""From a model to an adapter folder and back. Reading checks everything before the model is touched."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_steering_plugin import registry
from llava_steering_plugin.adapters import files
from llava_steering_plugin.adapters.attach import Attachment, attach, attachment_of, required, set_parameters
from llava_steering_plugin.adapters.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.files import ADAPTER, ADDED, EXTRA, FINGERPRINT, StoredAdapter
from llava_steering_plugin.adapters.summary import model_card
from llava_steering_plugin.errors import AdapterError, ArgumentsError, BaseMismatch, SteeringError, listing
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.zero import gathered, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How many embedding rows identify a base, and how many of their columns: 4 KB that tell any two models apart.
FINGERPRINT_ROWS, FINGERPRINT_COLUMNS = 16, 64
# Training loads bfloat16 (8 bits of mantissa), serving float16.
FINGERPRINT_TOLERANCE = 1e-2


def describe(attachment: Attachment) -> AdapterConfig:
    """The adapter's config: as trained or loaded, or from the model itself where neither has set one."""
    if attachment.config is not None:
        return attachment.config
    model_config: Any = attachment.model.config
    base = BaseModel(
        str(getattr(model_config, "_name_or_path", "")),
        str(model_config.model_type),
        attachment.shape.hidden_size,
        len(attachment.shape.layers),
        int(model_config.vocab_size),
    )
    return AdapterConfig(attachment.mode.name, attachment.mode.settings(), base)


def save_adapter(model: PreTrainedModel, folder: str | os.PathLike[str], *, write: bool = True) -> None:
    """Writes the adapter on `model`, and all that its base cannot reproduce, to `folder`.

    Args:
        model: carries an adapter; under ZeRO-3 every rank must call this.
        folder: created if need be; an adapter in it is replaced as a whole or not at all.
        write: False on the ranks that only help to gather.

    Raises:
        SteeringError: the model carries no adapter.
        AdapterError: the folder cannot be written.
    """
    attachment = required(model)
    config = describe(attachment)
    parameters = {ADAPTER + name: parameter for name, parameter in attachment.parameters().items()}
    parameters |= {EXTRA + name: model.get_parameter(name) for name in sorted(attachment.extras)}
    tensors = {name: whole(parameter, write) for name, parameter in parameters.items()}
    tensors |= _vocabulary(model, config, write)
    if write:
        count = sum(value.numel() for name, value in tensors.items() if name.startswith(ADAPTER))
        files.write(folder, config, tensors, _llava_config(model), model_card(config, count, sorted(attachment.extras)))


def _vocabulary(model: PreTrainedModel, config: AdapterConfig, keep: bool) -> dict[str, Tensor]:
    """The rows of added tokens, and the rows by which the base is recognised."""
    inputs, outputs = (layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    added = torch.tensor(list(config.added_tokens.values()), dtype=torch.long)
    with gathered([inputs, outputs]):
        if not keep:
            return {}
        known = torch.tensor(
            sorted(set(range(min(config.base.vocab_size, inputs.shape[0]))) - set(added.tolist())), dtype=torch.long
        )
        ids = known[torch.linspace(0, len(known) - 1, min(FINGERPRINT_ROWS, len(known))).long()]
        found = {
            FINGERPRINT + "ids": ids,
            FINGERPRINT + "rows": inputs.detach()[ids.to(inputs.device), :FINGERPRINT_COLUMNS].float().cpu(),
        }
        if len(added):
            found[ADDED + "input"] = inputs.detach()[added.to(inputs.device)].cpu()
            found[ADDED + "output"] = outputs.detach()[added.to(outputs.device)].cpu()
        return found


def _llava_config(model: PreTrainedModel) -> str:
    """config.json: the model's, without the quantisation, which is a matter of whoever loads it."""
    data = model.config.to_diff_dict()
    data.pop("quantization_config", None)
    return json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"


def mode_of(config: AdapterConfig) -> Mode:
    """The mode with the adapter's settings.

    Raises:
        AdapterError: the mode is not installed, or does not know these settings.
    """
    try:
        mode = registry.configured(config.mode, config.settings)
    except ArgumentsError as error:
        if config.mode in registry.names():
            raise AdapterError(f"the adapter is of another version of its mode, or damaged: {error}") from error
        raise AdapterError(f"the adapter needs a mode that is not installed: {error}") from error
    problems = mode.problems()
    if problems:
        raise AdapterError(listing("the adapter's settings are out of range", problems))
    return mode


def load_adapter(model: PreTrainedModel, name_or_path: str | os.PathLike[str], tokenizer: Any = None) -> Attachment:
    """Puts a saved adapter on the base it was trained on. `model` is untouched unless everything fits.

    Args:
        model: the base, as `load_pretrained_model` or `from_pretrained` gives it.
        name_or_path: adapter folder or hub id.
        tokenizer: the base's tokenizer; tokens that training added are added to it too.

    Raises:
        AdapterError: not found, damaged, of another kind, or with tensors that do not fit; all mismatches at once.
        BaseMismatch: `model` is not the base that the adapter was trained on.
        SteeringError: the model carries an adapter already.
    """
    stored = files.read(files.find(name_or_path) or name_or_path)
    _check_base(model, stored)
    attachment = attach(model, mode_of(stored.config))
    try:
        _check_tensors(attachment, stored)
        _check_tokens(stored, tokenizer)
        _add_tokens(model, stored, tokenizer)
        restore(attachment, stored)
    except BaseException:
        attachment.remove()
        raise
    attachment.config = stored.config
    return attachment


def restore(attachment: Attachment, stored: StoredAdapter) -> None:
    """Copies a checked adapter's tensors into the modules and the base.

    Raises:
        AdapterError: names or shapes do not fit (all listed); nothing is copied then.
    """
    _check_tensors(attachment, stored)
    set_parameters(attachment.parameters(), stored.section(ADAPTER))
    extras = stored.section(EXTRA)
    attachment.extras |= extras.keys()
    _unquantise(attachment.model, extras)
    set_parameters({name: attachment.model.get_parameter(name) for name in extras}, extras)


def _check_tensors(attachment: Attachment, stored: StoredAdapter) -> None:
    shapes = {ADAPTER + name: _shape(parameter) for name, parameter in attachment.parameters().items()}
    for name in stored.section(EXTRA):
        if (shape := _extra_shape(attachment.model, name)) is not None:
            shapes[EXTRA + name] = shape
    if added := len(stored.config.added_tokens):
        embeddings = attachment.model.get_input_embeddings(), attachment.model.get_output_embeddings()
        for part, layer in zip(("input", "output"), embeddings, strict=True):
            shapes[ADDED + part] = (added, *_shape(layer.weight)[1:])
    kinds = (ADAPTER, EXTRA, ADDED)
    held = {name: tuple(value.shape) for name, value in stored.tensors.items() if name.startswith(kinds)}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - held.keys())]
    problems += [f"{name} has no place in this model" for name in sorted(held.keys() - shapes.keys())]
    problems += [
        f"{name} is {list(held[name])} where the model needs {list(shapes[name])}"
        for name in sorted(shapes.keys() & held.keys())
        if held[name] != shapes[name]
    ]
    if problems:
        raise AdapterError(
            listing(f"the adapter in {stored.path} does not fit its own settings or this model", problems)
        )


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _extra_shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    """Shape of a parameter of the base; of a quantised linear's weight, what it is unpacked; None if there is none."""
    path, _, leaf = name.rpartition(".")
    try:
        host = model.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(host, nn.Linear) and leaf == "weight":
        return (host.out_features, host.in_features)
    parameter = getattr(host, leaf, None)
    return _shape(parameter) if isinstance(parameter, nn.Parameter) else None


def _unquantise(model: PreTrainedModel, tensors: Iterable[str]) -> None:
    """Gives back plain linears where a loader has quantised ones that the adapter brings weights for.

    LLaVA's 4-bit loader quantises the projector too; the trained projector cannot be copied into packed weights.
    """
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        host = model.get_submodule(path)
        if leaf != "weight" or type(host) is nn.Linear or not isinstance(host, nn.Linear):
            continue
        plain = nn.Linear(host.in_features, host.out_features, host.bias is not None, dtype=model.dtype)
        plain.requires_grad_(False)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.to(host.weight.device))


def _check_base(model: PreTrainedModel, stored: StoredAdapter) -> None:
    if attachment_of(model) is not None:
        raise SteeringError("this model carries an adapter already; call llava_steering_plugin.remove(model) first.")
    base, config = stored.config.base, model.config
    here = (int(config.num_hidden_layers), int(config.hidden_size))
    problems = []
    if here != (base.num_layers, base.hidden_size):
        problems.append(
            f"it was trained on {base.num_layers} layers of width {base.hidden_size}; "
            f"this model has {here[0]} of width {here[1]}"
        )
    weight = model.get_input_embeddings().weight
    ids, rows = stored.tensors.get(FINGERPRINT + "ids"), stored.tensors.get(FINGERPRINT + "rows")
    if ids is None or rows is None or rows.dim() != 2 or len(rows) != len(ids):
        raise AdapterError(
            f"{stored.path} has no whole fingerprint of its base, so it cannot be checked; the file is damaged."
        )
    with gathered([weight]):
        if len(ids) and int(ids.max()) >= weight.shape[0]:
            problems.append(f"its base has {base.vocab_size} embedding rows; this model has {weight.shape[0]}")
        elif not problems and not _alike(weight.detach()[ids.to(weight.device), : rows.shape[1]].float().cpu(), rows):
            problems.append("the embedding rows that identify the base differ: same shape, other weights")
    if problems:
        where = getattr(config, "_name_or_path", "") or type(model).__name__
        raise BaseMismatch(
            listing(
                f"the adapter in {stored.path} does not belong to {where}. Load it on {base.name_or_path} "
                "(--model-base, if it has moved)",
                problems,
            )
        )


def _alike(here: Tensor, there: Tensor) -> bool:
    if here.shape != there.shape:
        return False
    floor = FINGERPRINT_TOLERANCE * float(there.abs().mean())
    return torch.allclose(here, there, rtol=FINGERPRINT_TOLERANCE, atol=floor)


def _check_tokens(stored: StoredAdapter, tokenizer: Any) -> None:
    """Refuses a tokenizer in which the adapter's own tokens get other ids; tried out on a copy."""
    added = stored.config.added_tokens
    if not added or tokenizer is None:
        return
    trial = copy.deepcopy(tokenizer)
    trial.add_tokens(list(added), special_tokens=True)
    numbers = {token: trial.convert_tokens_to_ids(token) for token in added}
    if wrong := [
        f"{token} has id {numbers[token]}, trained as {number}"
        for token, number in added.items()
        if numbers[token] != number
    ]:
        raise BaseMismatch(listing("the tokenizer gives the adapter's own tokens other ids than in training", wrong))


def _add_tokens(model: PreTrainedModel, stored: StoredAdapter, tokenizer: Any) -> None:
    """Repeats what training did to the vocabulary: the same tokens under the same ids, with the rows they had."""
    added = stored.config.added_tokens
    if not added:
        return
    if tokenizer is not None:
        tokenizer.add_tokens(list(added), special_tokens=True)
    rows = max(added.values()) + 1
    if model.get_input_embeddings().weight.shape[0] < rows:
        model.resize_token_embeddings(rows)
    ids = torch.tensor(list(added.values()))
    for part, layer in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        with torch.no_grad(), gathered([layer.weight], modify=True):
            weight = layer.weight
            weight[ids.to(weight.device)] = stored.tensors[ADDED + part].to(weight.device, weight.dtype)


def with_base(config: AdapterConfig, name_or_path: str) -> AdapterConfig:
    """The config with the base loaded from elsewhere."""
    return replace(config, base=replace(config.base, name_or_path=name_or_path))
