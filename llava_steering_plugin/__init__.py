"""Parameter-efficient tuning modes for LLaVA, switched on by one flag of upstream's own scripts.

This is the public API; docs/python-api.md shows it at work. Names are loaded on first use: importing the package
imports no torch, so that it costs nothing in the processes of LLaVA that do not need it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_steering_plugin.adapters.attachment import (
        Attachment,
        attach,
        attachment_of,
        disable_adapter,
        disabled,
        remove,
        remove_adapter,
    )
    from llava_steering_plugin.adapters.pretrained import from_pretrained, get_model
    from llava_steering_plugin.adapters.save_load import load_adapter, save_adapter
    from llava_steering_plugin.adapters.stored.chat_template import chat_template_of
    from llava_steering_plugin.adapters.stored.config import AdapterConfig
    from llava_steering_plugin.errors import (
        AdapterError,
        ArgumentsError,
        BaseMismatch,
        CheckpointError,
        DataError,
        NotFiniteError,
        NotFiniteWarning,
        SteeringError,
        TokenMapError,
        UpstreamError,
    )
    from llava_steering_plugin.hooks.scope import token_map
    from llava_steering_plugin.modes.base import ForwardPass, Mode, setting
    from llava_steering_plugin.modes.joint import joint
    from llava_steering_plugin.modes.mixlora import MixLoRA
    from llava_steering_plugin.modes.mores import MoReS
    from llava_steering_plugin.pool.choosing import use_adapter, using
    from llava_steering_plugin.pool.pool import AdapterPool
    from llava_steering_plugin.training.trainer import SteeringTrainerMixin

    __version__: str

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterPool",
    "ArgumentsError",
    "Attachment",
    "BaseMismatch",
    "CheckpointError",
    "DataError",
    "ForwardPass",
    "MixLoRA",
    "MoReS",
    "Mode",
    "NotFiniteError",
    "NotFiniteWarning",
    "SteeringError",
    "SteeringTrainerMixin",
    "TokenMapError",
    "UpstreamError",
    "__version__",
    "attach",
    "attachment_of",
    "chat_template_of",
    "disable_adapter",
    "disabled",
    "from_pretrained",
    "get_model",
    "joint",
    "load_adapter",
    "remove",
    "remove_adapter",
    "save_adapter",
    "setting",
    "token_map",
    "use_adapter",
    "using",
]

_HOMES = {
    "adapters.attachment": (
        "Attachment",
        "attach",
        "attachment_of",
        "disable_adapter",
        "disabled",
        "remove",
        "remove_adapter",
    ),
    "adapters.stored.chat_template": ("chat_template_of",),
    "adapters.stored.config": ("AdapterConfig",),
    "adapters.pretrained": ("from_pretrained", "get_model"),
    "adapters.save_load": ("load_adapter", "save_adapter"),
    "errors": (
        "AdapterError",
        "ArgumentsError",
        "BaseMismatch",
        "CheckpointError",
        "DataError",
        "NotFiniteError",
        "NotFiniteWarning",
        "SteeringError",
        "TokenMapError",
        "UpstreamError",
    ),
    "hooks.scope": ("token_map",),
    "modes.base": ("ForwardPass", "Mode", "setting"),
    "modes.joint": ("joint",),
    "modes.mixlora": ("MixLoRA",),
    "modes.mores": ("MoReS",),
    "pool.choosing": ("use_adapter", "using"),
    "pool.pool": ("AdapterPool",),
    "training.trainer": ("SteeringTrainerMixin",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("llava-steering-plugin")
        except PackageNotFoundError:  # a source tree on the path that nobody has installed
            return "unknown"
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
