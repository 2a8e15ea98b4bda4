"""The entry point of the group `lmms_eval.models`: names our model to lmms-eval.

lmms-eval loads it at every start, also for other models, so it imports nothing else of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "llava_steering"


def manifest() -> ModelManifest:
    """Return what lmms-eval registers: `--model llava_steering` and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, simple_class_path="llava_steering_plugin.harness.model.LlavaSteering")
