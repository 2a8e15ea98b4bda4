"""Adapters on transformers' own models as PEFT's users know them: `get_model`, `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.adapters.attachment import Attachment, attach
from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import load_adapter, save_adapter
from llava_steering_plugin.adapters.stored.folder import StoredAdapter
from llava_steering_plugin.adapters.stored.locate import AdapterSource, read
from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.modes.base import Mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# An entry of the config of every LLaVA that LLaVA's own code has written.
OF_LLAVA = "mm_vision_tower"


def get_model(
    model: PreTrainedModel, mode: Mode | str, *, train_projector: bool = False, **settings: Any
) -> PreTrainedModel:
    """Put a fresh adapter on `model`, freeze everything else, and have the model save the adapter alone.

    Its `save_pretrained` and `push_to_hub` write an adapter folder, so the checkpoints of a trainer are adapters, until
    `remove_adapter(model)`.

    Args:
        model: a decoder-only model of transformers, with or without images.
        mode: a mode with its settings (`MoReS(rank=1)`), or a registered name with the settings as keywords.
        train_projector: also train the projector between vision tower and decoder, and save it with the adapter.

    Returns:
        The model itself.

    Raises:
        ArgumentsError: unknown mode or settings that do not fit; or there is no projector to train.
        SteeringError: the model carries an adapter already, or is of no kind that can carry one.
    """
    attachment = attach(model, mode, **settings)
    try:
        if train_projector:
            attachment.extras |= image_parameters(model).keys()
            if not attachment.extras:
                raise ArgumentsError(f"train_projector: {type(model).__name__} has no projector that is known here.")
        return _ready(attachment, trainable=True)
    except BaseException:
        attachment.remove()
        raise


def from_pretrained(
    adapter: AdapterSource,
    *,
    base: PreTrainedModel | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    is_trainable: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load an adapter with its base.

    Args:
        adapter: folder or hub id.
        base: folder or hub id, or the model itself; None: the one that the adapter names.
        tokenizer: the base's; needed where training added tokens, which are added to it too.
        is_trainable: let what the adapter holds be trained on; the rest of the base is frozen in any case.
        settings: for `from_pretrained` of the base, such as dtype, device_map or quantization_config.

    Returns:
        The base with the adapter on it, in eval mode, as `get_model` returns it.

    Raises:
        AdapterError: not found, damaged, or its tensors do not fit; or its base is a checkpoint of LLaVA's own.
        BaseMismatch: the base is another one than the adapter was trained on.
        SteeringError: the base is not found.
        ArgumentsError: settings for a base that is loaded already.
    """
    stored = read(adapter)
    if base is None or isinstance(base, str | os.PathLike):
        model = _load_base(stored, stored.config.base.name_or_path if base is None else os.fspath(base), settings)
    elif settings:
        raise ArgumentsError(f"the base is loaded already, and takes no settings any more: {', '.join(settings)}.")
    else:
        model = base
    return _ready(load_adapter(model, stored, tokenizer), trainable=is_trainable).eval()


def _ready(attachment: Attachment, *, trainable: bool) -> PreTrainedModel:
    model = attachment.model
    model.requires_grad_(False)
    for parameter in [*attachment.trained().values(), *map(model.get_parameter, attachment.extras)]:
        parameter.requires_grad_(trainable)
    attachment.give_methods(
        {"save_pretrained": functools.partial(_save, model), "push_to_hub": functools.partial(_push, model)}
    )
    return model


def _load_base(stored: StoredAdapter, name: str, settings: dict[str, Any]) -> PreTrainedModel:
    import transformers

    described = read_config(name)
    if OF_LLAVA in described:
        raise AdapterError(
            f"the base of the adapter in {stored.path}, {name}, is a checkpoint of LLaVA's own, which transformers "
            f"cannot load. Convert it once with `llava-steering export {name} FOLDER`, and give base=FOLDER; or load "
            "it with LLaVA, and the adapter with load_adapter()."
        )
    kinds = [getattr(transformers, each, None) for each in described.get("architectures") or ()]
    kind: Any = next((each for each in kinds if each is not None), None)
    if kind is None:
        auto = getattr(transformers, "AutoModelForImageTextToText", None)
        config = transformers.AutoConfig.from_pretrained(name)
        kind = auto if auto is not None and type(config) in auto._model_mapping else transformers.AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(name, **settings)
    return model


def _save(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **others: Any,
) -> None:
    """Write the adapter alone. What else transformers' `save_pretrained` takes is about whole models, but for a token.

    Raises:
        AdapterError: the folder cannot be written.
    """
    save_adapter(model, save_directory, write=is_main_process)
    if push_to_hub and is_main_process:
        name = repo_id or os.path.basename(os.path.abspath(save_directory))
        chosen = ("token", "private", "commit_message", "revision", "create_pr", "commit_description")
        _push(model, name, **{key: others[key] for key in chosen if key in others})


def _push(
    model: PreTrainedModel,
    repo_id: str,
    commit_message: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
    **others: Any,
) -> Any:
    """Upload the adapter and its card to the hub; the repository is made if it is not there."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
