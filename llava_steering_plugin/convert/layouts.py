"""Tells which of the authors' two layouts a folder has, and reads it."""

from __future__ import annotations

from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import CONFIG, WEIGHTS
from llava_steering_plugin.convert import mixlora, mores
from llava_steering_plugin.convert.released import Released
from llava_steering_plugin.errors import AdapterError


def read_released(folder: Path) -> Released:
    """Read a released checkpoint of either method.

    Raises:
        AdapterError: no folder, neither layout or both, or the checkpoint is damaged, refused or cannot be converted.
    """
    try:
        if not folder.is_dir():
            raise AdapterError(
                f"{folder} is no folder. Give the folder of a checkpoint on this machine; one on the hub has to be "
                "downloaded first: huggingface-cli download NAME --local-dir FOLDER."
            )
        inner, routed = mores.found(folder), (folder / mixlora.ARGUMENTS).exists()
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error}.") from error
    if inner is not None and routed:
        raise AdapterError(
            f"{folder} holds both a MoReS checkpoint ({inner}) and a MixLoRA checkpoint ({mixlora.ARGUMENTS}), and "
            "it is unclear which is meant. Move one of them to a folder of its own."
        )
    if inner is not None:
        return mores.ReleasedMoReS.read(inner)
    if routed:
        return mixlora.ReleasedMixLoRA.read(folder)
    if (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder} is an adapter already, of this plugin's or PEFT's; there is nothing to convert.")
    raise AdapterError(
        f"{folder} holds no checkpoint of the authors': neither mores/language_model with intkey_*.bin, {mores.LAYERS} "
        f"and {mores.POSITIONS}, nor {mixlora.ARGUMENTS} beside the weights. Give the folder that holds these."
    )
