"""Tell from the source of a LLaVA, without importing it, whether its trainer can run."""

from __future__ import annotations

from pathlib import Path

from llava_steering_plugin.upstream.source import module_file, undefined_names

_TRAINER = "llava.train.llava_trainer"
# The last commit whose trainer has all the names that it uses.
_SOUND = "b42941c"


def broken_trainer(llava: Path) -> str | None:
    """Return why the trainer of a LLaVA fails, with any training, and how to go on; None if it does not.

    Args:
        llava: the folder of the package; it is not imported.

    Raises:
        UpstreamError: the trainer's file cannot be parsed.
    """
    file = module_file(llava, _TRAINER)
    missing = sorted(undefined_names(file)) if file is not None else []
    if file is None or not missing:
        return None
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"no training runs in this LLaVA, with or without a tuning mode: {file} uses {shown} without importing them "
        "(NameError). LLaVA-NeXT is so since its commit 45f2d92. Take the trainer of the last commit before: "
        f"`git checkout {_SOUND} -- llava/train/llava_trainer.py` in the checkout. Loading and answering work as it is"
    )
