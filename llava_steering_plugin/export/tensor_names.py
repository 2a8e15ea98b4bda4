"""The names of a LLaVA's tensors in both layouts.

transformers' are those of its versions before 5, which newer ones read too, and which vLLM asks for:
`language_model.model.*`, `language_model.lm_head.*`, `vision_tower.vision_model.*`, `multi_modal_projector.linear_N.*`.
"""

from __future__ import annotations

import re

PROJECTOR = "multi_modal_projector"
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
# In a LLaVA whose vision tower was trained (unfreeze_mm_vision_tower); else LLaVA reads the tower's own folder.
TOWER_IN_LLAVA = "model.vision_tower.vision_tower."
TOWER = "vision_model."
# Ends the lines of an image in tiles; in both layouts a part of the model itself.
NEWLINE, NEWLINE_IN_LLAVA = "image_newline", "model.image_newline"
# Computed from the config. Older versions of transformers wrote them.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_LINEARS = {"": "linear_1.", "0.": "linear_1.", "2.": "linear_2."}


def is_computed(name: str) -> bool:
    """Say whether a tensor follows from the config, so that no layout keeps it."""
    return _COMPUTED.search(name) is not None


def to_transformers(name: str, *, tiles: bool = False) -> str | None:
    """Return transformers' name of a tensor of LLaVA's; None if it has none.

    Args:
        name: of the language model or the projector in a LLaVA, or beginning with "vision_model." in its tower.
        tiles: the model is a LlavaNext.
    """
    if tiles and name == NEWLINE_IN_LLAVA:
        return NEWLINE
    if name.startswith(TOWER):
        return f"vision_tower.{name}"
    if found := re.fullmatch(r"model\.mm_projector\.(|0\.|2\.)(weight|bias)", name):
        return f"{PROJECTOR}.{_LINEARS[found[1]]}{found[2]}"
    if re.match(r"model\.(embed_tokens|layers|norm)\.|lm_head\.", name):
        return f"language_model.{name}"
    return None


def to_llava(name: str, *, one_linear: bool) -> str | None:
    """Return LLaVA's name of a tensor of transformers'; None if it has none.

    A name of the tower begins with "vision_model.": it is a model of its own, beside LLaVA's.

    Args:
        name: as any version of transformers writes it.
        one_linear: the projector is a linear, and what follows it the identity, which LLaVA does without.
    """
    if found := re.fullmatch(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", name):
        return TOWER + found[1]
    if found := re.fullmatch(rf"(?:model\.)?{PROJECTOR}\.linear_([12])\.(weight|bias)", name):
        if one_linear:
            return f"model.mm_projector.{found[2]}" if found[1] == "1" else None
        return f"model.mm_projector.{0 if found[1] == '1' else 2}.{found[2]}"
    if found := re.fullmatch(r"(?:language_model\.model|model\.language_model)\.(.+)", name):
        return f"model.{found[1]}"
    if re.fullmatch(rf"(?:model\.)?{NEWLINE}", name):
        return NEWLINE_IN_LLAVA
    if re.fullmatch(r"(?:language_model\.)?lm_head\.weight", name):
        return "lm_head.weight"
    return None
