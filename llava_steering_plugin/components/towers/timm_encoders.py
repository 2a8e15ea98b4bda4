"""Any encoder of timm: `--vision_tower timm:vit_base_patch16_clip_224.openai`, or a folder in timm's layout of the hub.

A folder holds config.json and model.safetensors, as timm's own `push_to_hf_hub` and `save_for_hf` write them. A layer's
tokens are what comes out of it, without the norm that may follow; of a network whose layers are images, the pixels.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.towers.released_files import clip_processor
from llava_steering_plugin.errors import ArgumentsError, nearest
from llava_steering_plugin.foreign_files import check_folder, pinned, read_json

WEIGHTS = "model.safetensors"
# Numbers that PIL has for the names of interpolations that timm uses.
INTERPOLATIONS = {"nearest": 0, "bilinear": 2, "bicubic": 3, "lanczos": 1}


@dataclass(frozen=True)
class Timm(Tower):
    """Describes an encoder of timm."""

    name: ClassVar[str] = "timm"
    summary: ClassVar[str] = "any encoder of timm, by its name or a folder"

    @classmethod
    def missing(cls) -> str:
        """Return how to install timm."""
        absent = [package for package in ("timm", "torchvision") if importlib.util.find_spec(package) is None]
        if not absent:
            return ""
        return (
            f"{' and '.join(absent)} not installed: pip install 'llava-steering-plugin[towers]' (docs/components.md "
            "says which torchvision loads beside a torch for the CPU)"
        )

    @property
    def _where(self) -> str:
        return f"--vision_tower {self.name}:{self.source}"

    @property
    def _folder(self) -> str | None:
        """The folder of the source; of a file, the one that it lies in."""
        if os.path.isfile(self.source):
            if os.path.basename(self.source) != WEIGHTS:
                raise ArgumentsError(f"{self._where}: of files only {WEIGHTS} is read, with config.json beside it")
            return os.path.dirname(os.path.abspath(self.source))
        return self.source if os.path.isdir(self.source) else None

    def _architecture(self) -> tuple[str, dict[str, Any]]:
        """Return the name of the architecture, and arguments that build it."""
        import timm

        if not self.source:
            raise ArgumentsError(f"--vision_tower {self.name} needs a source: {self.name}:NAME, or {self.name}:FOLDER")
        folder = self._folder
        if folder is None:
            name = self.source.partition(".")[0]
            if os.sep in self.source or not timm.is_model(name):
                raise ArgumentsError(
                    f"{self._where}: timm {timm.__version__} has no encoder of that name, and there is no such folder. "
                    + nearest(name, timm.list_models()).strip()
                )
            return self.source, {}
        check_folder(folder, f"{self._where}: the folder")
        try:
            described = read_json(os.path.join(folder, "config.json"))
            name = described["architecture"]
            data = described.get("pretrained_cfg", described)
            arguments = {**described.get("model_args", {}), "pretrained_cfg": dict(data)}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArgumentsError(
                f"{self._where}: {folder} has no config.json in timm's layout ({error!r}): an architecture, and "
                "pretrained_cfg"
            ) from error
        if not timm.is_model(name):
            raise ArgumentsError(f"{self._where}: timm {timm.__version__} has no encoder {name!r}")
        return name, arguments

    def build(self) -> nn.Module:
        """Return the encoder without its weights."""
        import timm

        name, arguments = self._architecture()
        try:
            encoder: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ArgumentsError(f"{self._where}: timm cannot build it: {error}") from error
        return encoder

    def load(self) -> nn.Module:
        """Return the encoder with the weights of the folder, or with those that timm fetches by the name."""
        import timm
        from safetensors.torch import load_file

        folder = self._folder
        if folder is None:
            encoder: nn.Module = timm.create_model(self.source, pretrained=True, num_classes=0)
            return encoder
        encoder = self.build()
        with pinned(os.path.join(folder, WEIGHTS)) as pinned_weights:
            wanted, found = encoder.state_dict(), load_file(pinned_weights)
        absent = sorted(wanted.keys() - found.keys())
        if absent:
            raise ArgumentsError(f"{self._where}: {WEIGHTS} lacks {len(absent)} tensors, such as {absent[0]}")
        encoder.load_state_dict({name: found[name] for name in wanted})  # without those of a classifier
        return encoder

    def shape(self) -> TowerShape:
        """Return the sizes, found out by a pass on the meta device."""
        if missing := self.missing():
            raise ArgumentsError(missing)
        return _shape(self)

    def image_processor(self) -> Any:
        """Return a processor with the encoder's mean, deviation and interpolation."""
        data = _data(self)
        prepared = {
            "image_mean": data["mean"],
            "image_std": data["std"],
            "resample": INTERPOLATIONS.get(data["interpolation"], 3),
        }
        return clip_processor(data["input_size"][-1], prepared)

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return what comes out of the layer, row by row, with its class and register tokens where they are asked for.

        timm counts layers from 0; hidden states, as LLaVA counts them, begin with the embeddings.
        """
        index = self.layer if self.layer < 0 else self.layer - 1
        run: Any = encoder.forward_intermediates
        asked = {"indices": [index], "norm": False, "intermediates_only": True}
        if self.feature == "patch":
            image: Tensor = run(pixels, output_fmt="NCHW", **asked)[0]
            return image.flatten(2).transpose(1, 2)
        tokens, leading = run(pixels, output_fmt="NLC", return_prefix_tokens=True, **asked)[0]
        return torch.cat([leading, tokens], dim=1)


def _data(tower: Timm) -> dict[str, Any]:
    """Return how timm prepares images for the encoder."""
    from timm.data import resolve_model_data_config

    with torch.device("meta"):
        encoder = tower.build()
    data: dict[str, Any] = resolve_model_data_config(encoder)
    return data


@functools.lru_cache(maxsize=16)
def _shape(tower: Timm) -> TowerShape:
    with torch.device("meta"):
        encoder = tower.build()
    where = f"--vision_tower {tower.name}:{tower.source}"
    if not hasattr(encoder, "forward_intermediates"):
        raise ArgumentsError(f"{where}: timm does not give the layers of this encoder away (no forward_intermediates)")
    _, height, width = _data(tower)["input_size"]
    if height != width:
        raise ArgumentsError(f"{where}: it takes images of {width} x {height} pixels; LLaVA's are squares")
    prefix = int(getattr(encoder, "num_prefix_tokens", 0))
    if tower.feature not in ("patch", "cls_patch") or (tower.feature == "cls_patch" and not prefix):
        raise ArgumentsError(
            f"{where}: --mm_vision_select_feature is {tower.feature!r:.50}; the tower has patch"
            + ", cls_patch" * bool(prefix)
        )
    network: Any = encoder
    layers = len(network.blocks) if prefix and hasattr(network, "blocks") else len(network.feature_info)
    if type(tower.layer) is not int or not (-layers <= tower.layer < 0 or 0 < tower.layer <= layers):
        raise ArgumentsError(f"{where}: --mm_vision_select_layer is {tower.layer!r:.50}; the tower has {layers} layers")
    with torch.no_grad():
        tokens = tower.encode(encoder.eval(), torch.empty(1, 3, height, width, device="meta"))
    leading = prefix if tower.feature == "cls_patch" else 0
    count = tokens.shape[1]
    side = round((count - leading) ** 0.5)
    squares = side if side * side == count - leading else None
    return TowerShape(height, ImageTokens(count, tokens.shape[2], squares, leading), layers)
