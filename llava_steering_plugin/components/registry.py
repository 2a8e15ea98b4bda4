"""Look up the installed components: vision towers, connectors and language models, each in a group of entry points."""

from __future__ import annotations

from llava_steering_plugin.components.base import Connector, LanguageModel, Tower
from llava_steering_plugin.registered import Registered

PAGE = "docs/adding-a-component.md"
# The abstract class is the parent of those that are registered; mypy fears that it is called.
TOWERS = Registered("llava_steering.towers", "vision tower", Tower, PAGE)  # type: ignore[type-abstract]
CONNECTORS = Registered("llava_steering.connectors", "connector", Connector, PAGE)  # type: ignore[type-abstract]
_OWN = "llava_steering_plugin.components.language_models"
LANGUAGE_MODELS = Registered(
    "llava_steering.language_models",
    "language model",
    LanguageModel,
    PAGE,
    (
        ("gemma", f"{_OWN}.newer:Gemma"),
        ("mistral", f"{_OWN}.mistral:Mistral"),
        ("phi", f"{_OWN}.phi:Phi"),
        ("phi3", f"{_OWN}.newer:Phi3"),
        ("qwen2", f"{_OWN}.qwen2:Qwen2"),
        ("qwen3", f"{_OWN}.newer:Qwen3"),
        ("smollm2", f"{_OWN}.smollm2:SmolLM2"),
        ("stablelm", f"{_OWN}.newer:StableLM"),
    ),
)


def split(text: str) -> tuple[str, str]:
    """Return the name of a component and what follows its colon: ("siglip", "google/siglip-base-patch16-224")."""
    name, _, rest = text.partition(":")
    return name, rest
