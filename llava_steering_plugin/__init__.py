"""Parameter-efficient tuning modes for LLaVA, switched on by one flag of upstream's own scripts.

The public API. It is loaded on first use: importing the package imports no torch, so that it costs nothing in the
processes of LLaVA that do not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_steering_plugin.adapters.attach import Attachment, attach, disabled, remove
    from llava_steering_plugin.adapters.checkpoint import load_adapter, save_adapter
    from llava_steering_plugin.adapters.config import AdapterConfig
    from llava_steering_plugin.hooks.scope import token_map
    from llava_steering_plugin.serving.pool import AdapterPool, using

__all__ = [
    "AdapterConfig",
    "AdapterPool",
    "Attachment",
    "attach",
    "disabled",
    "load_adapter",
    "remove",
    "save_adapter",
    "token_map",
    "using",
]

_HOMES = {
    "adapters.attach": ("Attachment", "attach", "disabled", "remove"),
    "adapters.checkpoint": ("load_adapter", "save_adapter"),
    "adapters.config": ("AdapterConfig",),
    "hooks.scope": ("token_map",),
    "serving.pool": ("AdapterPool", "using"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
