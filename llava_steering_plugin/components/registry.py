"""Look up the installed components: vision towers, connectors and language models, each in a group of entry points."""

from __future__ import annotations

from llava_steering_plugin.components.base import Connector, LanguageModel, Tower
from llava_steering_plugin.registered import Registered

PAGE = "docs/adding-a-component.md"
_TOWERS_HERE = "llava_steering_plugin.components.towers"
_CONNECTORS_HERE = "llava_steering_plugin.components.connectors"
# What setup.cfg registers, for where the metadata are older than the code.
OUR_TOWERS = {
    "dinov2": f"{_TOWERS_HERE}.dinov2:Dinov2",
    "efficientnet-lite0": f"{_TOWERS_HERE}.efficientnet_lite0:EfficientNetLite0",
    "mof": f"{_TOWERS_HERE}.mof:Mof",
    "siglip": f"{_TOWERS_HERE}.siglip:Siglip",
    "timm": f"{_TOWERS_HERE}.timm_encoders:Timm",
}
OUR_CONNECTORS = {
    "avgpool": f"{_CONNECTORS_HERE}.average_pool:AveragePool",
    "mof-mlp": f"{_CONNECTORS_HERE}.mof_mlp:MofMlp",
    "pixel-shuffle": f"{_CONNECTORS_HERE}.pixel_shuffle:PixelShuffle",
    "qformer": f"{_CONNECTORS_HERE}.qformer:QFormer",
    "resampler": f"{_CONNECTORS_HERE}.resampler:Resampler",
}
TOWERS = Registered(
    "llava_steering.towers",
    "vision tower",
    Tower,  # type: ignore[type-abstract] # the parent of those that are registered; mypy fears that it is called
    PAGE,
    tuple(OUR_TOWERS.items()),
)
CONNECTORS = Registered(
    "llava_steering.connectors",
    "connector",
    Connector,  # type: ignore[type-abstract]
    PAGE,
    tuple(OUR_CONNECTORS.items()),
)
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
