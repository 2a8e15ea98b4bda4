"""Saves the adapter on a model to a folder, and puts a saved one on a model."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.attachment import Attachment, required
from llava_steering_plugin.adapters.fit.compatibility import check_tensors, fits, named_for, prepare
from llava_steering_plugin.adapters.fit.fingerprint import FINGERPRINT_COLUMNS, fingerprint_rows
from llava_steering_plugin.adapters.fit.quantised import unquantise
from llava_steering_plugin.adapters.fit.unmerged import refuse_unmerged
from llava_steering_plugin.adapters.fit.values import check_sizes
from llava_steering_plugin.adapters.parameters import set_parameters
from llava_steering_plugin.adapters.parts.added_tokens import add_tokens, check_tokens
from llava_steering_plugin.adapters.parts.image_parts import takes_images
from llava_steering_plugin.adapters.parts.image_settings import (
    SELECTED,
    differing_settings,
    own_settings,
    trained_settings,
)
from llava_steering_plugin.adapters.parts.original import Original
from llava_steering_plugin.adapters.stored.card import model_card
from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.stored.folder import ADAPTER, ADDED, EXTRA, FINGERPRINT, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import AdapterSource, read
from llava_steering_plugin.adapters.stored.writing import write_folder
from llava_steering_plugin.distributed import gathered, whole
from llava_steering_plugin.errors import AdapterError, SteeringError, listing
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.hooks.families import family_of
from llava_steering_plugin.hooks.owner import owner_of
from llava_steering_plugin.modes.base import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(attachment: Attachment) -> AdapterConfig:
    """Return the adapter's config: as trained or loaded, or from the model itself where neither has set one."""
    if attachment.config is not None:
        return attachment.config
    model_config: Any = attachment.model.config
    base = BaseModel(
        str(getattr(model_config, "_name_or_path", "")),
        str(model_config.model_type),
        attachment.shape.hidden_size,
        len(attachment.shape.layers),
        attachment.family.own_rows(int(attachment.family.text_config.vocab_size))[-1] + 1,
    )
    return AdapterConfig(attachment.mode.name, attachment.mode.settings(), base)


def save_adapter(model: PreTrainedModel, folder: str | os.PathLike[str], *, write: bool = True) -> None:
    """Write the adapter on `model`, and all that its base cannot reproduce, to `folder`.

    Args:
        model: carries an adapter; under ZeRO-3 every rank must call this.
        folder: created if need be; an adapter in it is replaced as a whole or not at all.
        write: False on the ranks that only help to gather.

    Raises:
        SteeringError: the model carries no adapter.
        AdapterError: the folder cannot be written.
    """
    attachment = required(model)
    config, peft = describe(attachment), attachment.mode.config_for_peft(attachment.shape)
    if peft is not None:
        peft["base_model_name_or_path"] = config.base.name_or_path
        config = dataclasses.replace(config, peft_prefix=_beginning_of_names(attachment.shape))
    parameters = {ADAPTER + name: parameter for name, parameter in attachment.parameters().items()}
    parameters |= {
        EXTRA + attachment.family.canonical(name): model.get_parameter(name) for name in sorted(attachment.extras)
    }
    tensors = {name: whole(parameter, write) for name, parameter in parameters.items()}
    tensors |= _vocabulary(model, config, write)
    if write:
        ours = {name.removeprefix(ADAPTER): value for name, value in tensors.items() if name.startswith(ADAPTER)}
        count = sum(value.numel() for value in ours.values())
        card = model_card(
            config,
            count,
            sorted(attachment.extras),
            attachment.mode.learned(ours),
            attachment.mode.full_name,
            of_llava=attachment.family.splices,
        )
        text = None if peft is None else json.dumps(peft, indent=2, sort_keys=True) + "\n"
        write_folder(folder, config, tensors, _llava_config(model), card, text)


def _beginning_of_names(shape: DecoderShape) -> str:
    """Return what PEFT puts before the names of tensors in the decoder."""
    return f"base_model.model.{shape.stack}." if shape.stack else "base_model.model."


def _vocabulary(model: PreTrainedModel, config: AdapterConfig, keep: bool) -> dict[str, Tensor]:
    """Return the rows of added tokens, and the rows by which the base is recognised."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    outputs = inputs if head is None else head.weight  # a decoder alone has no head, and takes no added tokens
    added = torch.tensor(list(config.added_tokens.values()), dtype=torch.long)
    with gathered([inputs, outputs]):
        if not keep:
            return {}
        others = family_of(model).own_rows(min(config.base.vocab_size, inputs.shape[0]))
        known = torch.tensor(sorted(set(others) - set(added.tolist())), dtype=torch.long)
        ids = known[fingerprint_rows(len(known))]
        found = {
            FINGERPRINT + "ids": ids,
            FINGERPRINT + "rows": inputs.detach()[ids.to(inputs.device), :FINGERPRINT_COLUMNS].float().cpu(),
        }
        if len(added):
            found[ADDED + "input"] = inputs.detach()[added.to(inputs.device)].cpu()
            found[ADDED + "output"] = outputs.detach()[added.to(outputs.device)].cpu()
        return found


def _llava_config(model: PreTrainedModel) -> str:
    """Return the text of config.json: the model's, without the quantisation, which the next load chooses."""
    data = model.config.to_diff_dict()
    data.pop("quantization_config", None)
    if not family_of(model).splices:
        data |= own_settings(model)  # by LLaVA's names, which all families read
    return json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"


def load_adapter(
    model: PreTrainedModel, name_or_path: AdapterSource, tokenizer: Any = None, *, as_trained: bool = True
) -> Attachment:
    """Put a saved adapter on the base it was trained on. Model and tokenizer are untouched unless everything fits.

    Args:
        model: the base, as `load_pretrained_model` or `from_pretrained` gives it.
        name_or_path: adapter folder or hub id, or the adapter as it was read.
        tokenizer: the base's tokenizer; tokens that training added are added to it too.
        as_trained: set the model's config to cut, encode and mark images as the adapter's training did.

    Raises:
        AdapterError: not found, damaged, of another kind, or with tensors that do not fit; all mismatches at once.
        BaseMismatch: `model` is not the base that the adapter was trained on.
        SteeringError: the model carries an adapter already.
    """
    if owner_of(model) is not None:
        raise SteeringError("this model carries an adapter already; call remove_adapter(model) first.")
    refuse_unmerged(model)
    stored = named_for(model, read(name_or_path, fits(model)))
    mode, modules = prepare(model, find_decoder(model)[1], stored)
    if not (as_trained and takes_images(model)):
        _check_features(model, stored)
    check_tokens(stored, tokenizer)
    trained = trained_settings(stored) if as_trained and takes_images(model) else None
    original = Original(model, stored, tokenizer)
    attachment = None
    try:
        attachment = Attachment(model, mode, modules, original)
        _replace_parameters(attachment, stored)
        if trained is not None:
            original.set_images(trained)
            _check_features(model, stored)
        add_tokens(model, stored, tokenizer)
        attachment.config = stored.config
        original.settle()
    except BaseException:
        if attachment is not None:
            attachment.remove()
        else:
            original.put_back()
        raise
    return attachment


def _check_features(model: PreTrainedModel, stored: StoredAdapter) -> None:
    """Refuse an adapter for other image features than the model's vision tower gives."""
    if problems := differing_settings(model, stored, SELECTED):
        raise AdapterError(
            listing(f"the adapter in {stored.path} does not know the image features of this model", problems)
        )


def restore(attachment: Attachment, stored: StoredAdapter) -> None:
    """Copy a saved adapter's tensors into the modules that are on the model already, and into the base.

    Raises:
        AdapterError: names, shapes or the sizes of values do not fit (all listed); nothing is copied then.
    """
    stored = named_for(attachment.model, stored)
    check_tensors(attachment.model, attachment.parameters(), stored)
    check_sizes(attachment.model, attachment.modules, stored)
    set_parameters(attachment.parameters(), stored.section(ADAPTER))
    _replace_parameters(attachment, stored)


def _replace_parameters(attachment: Attachment, stored: StoredAdapter) -> None:
    """Give the base the adapter's own parameters of it."""
    model, tensors = attachment.model, stored.section(EXTRA)
    unquantise(model, tensors, model.dtype)
    set_parameters({name: model.get_parameter(name) for name in tensors}, tensors)
    attachment.extras |= tensors.keys()
