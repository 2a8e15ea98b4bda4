"""Note in a checkpoint by which rule the training orders its samples: a resumed training has to see the same batches.

transformers' own state cannot hold it: versions that do not know a field refuse to read it.
"""

from __future__ import annotations

import json
from pathlib import Path

from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training.samples import RULES, SUMMED

NOTES = "steering_state.json"
ORDER = "sample_order"


def write(folder: Path, order: str) -> None:
    """Write the notes into the folder of a checkpoint.

    Args:
        order: the name of the rule for the order of samples.
    """
    (folder / NOTES).write_text(json.dumps({ORDER: order}, indent=2) + "\n", encoding="utf-8")


def order_of(checkpoint: Path) -> str:
    """Return the name of the rule by which the training that wrote a checkpoint orders its samples.

    Earlier versions wrote no notes, and had one rule.

    Raises:
        CheckpointError: the notes are damaged, or name a rule that this version does not know.
    """
    path = checkpoint / NOTES
    if not path.exists():
        return SUMMED
    if (found := _order_in(path)) is None:
        raise CheckpointError(
            f"{path} is cut short or damaged, so it is unknown in which order the training sees its samples. Resume "
            f"from another checkpoint, or start a new training from its weights: another --output_dir, and "
            f"{checkpoint} as --adapter_path."
        )
    if found not in RULES:
        raise CheckpointError(
            f"{path} orders the samples by the rule {found!r}, and this version knows {', '.join(map(repr, RULES))}. A "
            "later version wrote it: resume with that one."
        )
    return found


def problems(checkpoint: Path) -> list[str]:
    """Return what is wrong with the notes of a checkpoint; nothing is wrong where there are none."""
    path = checkpoint / NOTES
    return [f"{NOTES} is cut short"] if path.exists() and _order_in(path) is None else []


def _order_in(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[ORDER]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
