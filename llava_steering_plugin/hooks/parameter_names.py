"""The names that a model's own parameters have in an adapter's file: LLaVA's, whatever the model calls them.

transformers' classes differ from LLaVA in all paths, and from version to version of transformers: a decoder is
`model.language_model` in version 5, `language_model.model` in 4.51, and `model` in LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# LLaVA's name for the module between vision tower and decoder, and for the embedding that ends each line of tiles.
PROJECTOR, NEWLINE = "mm_projector", "image_newline"
# LLaVA's paths.
DECODER_PATH, HEAD_PATH = "model", "lm_head"
PROJECTOR_PATH, NEWLINE_PATH = f"{DECODER_PATH}.{PROJECTOR}", f"{DECODER_PATH}.{NEWLINE}"
TOWER_PATH = f"{DECODER_PATH}.vision_tower.vision_tower.vision_model"
# Parts of the projector, by their names in transformers. A projector of one linear has none in LLaVA.
PARTS = {"linear_1": "0", "linear_2": "2"}
ONE_LINEAR = ("weight", "bias")


@dataclass(frozen=True)
class Place:
    """A part of a model that LLaVA has elsewhere.

    Attributes:
        here: its path in the model.
        there: its path in LLaVA.
        parts: names of what is directly in it, by those in the model; others are the same in both.
    """

    here: str
    there: str
    parts: Mapping[str, str] = field(default_factory=dict)

    def to_llava(self, name: str) -> str | None:
        """Return LLaVA's name of a parameter; None if it is not in this part."""
        return _moved(name, self.here, self.there, self.parts)

    def from_llava(self, name: str) -> str | None:
        """Return the model's name of a parameter that has this one in LLaVA; None if it is not in this part."""
        return _moved(name, self.there, self.here, {there: here for here, there in self.parts.items()})


def of_one_linear(name: str) -> str:
    """Return the name of a parameter in a projector of several linears, for one in a projector that is a linear."""
    leaf = name.removeprefix(f"{PROJECTOR_PATH}.")
    return f"{PROJECTOR_PATH}.0.{leaf}" if leaf != name and leaf in ONE_LINEAR else name


def _moved(name: str, before: str, after: str, parts: Mapping[str, str]) -> str | None:
    if name == before:
        return after
    rest = name.removeprefix(f"{before}.")
    if rest == name:
        return None
    part, *leaf = rest.split(".")
    return ".".join([after, parts.get(part, part), *leaf])
