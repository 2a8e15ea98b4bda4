"""Compares what an adapter's own projector computes with what the model's does: names and shapes do not say it all.

transformers' Llava holds a projector of one linear as two, the second of which is the identity, with nothing between
them. Weights that were trained with an activation between have the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.adapters.stored.folder import EXTRA, StoredAdapter
from llava_steering_plugin.hooks.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAVAS, TRANSFORMERS = "mm_projector_type", "projector_hidden_act"
# LLaVA's own: of the second linear on, each follows an activation.
ONE_LINEAR = {"linear": "linear", "mlp1x_gelu": "linear"}
TWO_LINEARS = {"mlp2x_gelu": "gelu"}


def projector_problems(model: PreTrainedModel, stored: StoredAdapter) -> list[str]:
    """Return what is wrong with an adapter's own projector on this model beside names and shapes.

    Args:
        stored: with the names that its tensors of the base have in this model.
    """
    family = family_of(model)
    found = family.projector()
    if found is None or not any(name.startswith(f"{found[0]}.") for name in stored.section(EXTRA)):
        return []
    trained = stored.folder.llava_config or {}
    here: Mapping[str, Any] = vars(model.config)
    there_kind, here_kind = kind(trained), kind(here)
    if family.splices and here_kind == there_kind == "linear":
        if not any(name.startswith(f"{found[0]}.2.") for name in stored.section(EXTRA)):
            return []
        return [
            "its projector was trained as two linears with nothing between them, and LLaVA's is one: use the adapter "
            "with transformers' own class, or train it there with multi_modal_projector.linear_2 frozen"
        ]
    if None in (there_kind, here_kind) or there_kind == here_kind:
        return []
    return [f"its projector was trained as {_said(trained)}; this model's is {_said(here)}"]


def kind(config: Mapping[str, Any]) -> str | None:
    """Return the activation between the linears of a projector, "linear" if there is none; None if it is unknown.

    Args:
        config: LLaVA's, or one of transformers' own of several parts.
    """
    if isinstance(name := config.get(LLAVAS), str):
        return (ONE_LINEAR | TWO_LINEARS).get(name)
    if "text_config" in config:
        return str(config.get(TRANSFORMERS, "gelu"))  # left out where it is the default
    return None


def _said(config: Mapping[str, Any]) -> str:
    if LLAVAS in config:
        return f"{LLAVAS} {config[LLAVAS]!r}"
    return f"{TRANSFORMERS} {config.get(TRANSFORMERS, 'gelu')!r}"
