"""Note in a checkpoint what a resumed training needs besides transformers' state, to go on as if nothing had happened.

By which rule the samples are ordered, and what the mode has gathered over the last steps. transformers' own state
cannot hold it: versions that do not know a field refuse to read it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training.data.samples import RULES, SUMMED

NOTES = "steering_state.json"
# The order of samples is the trainer's own: transformers restores it from the random states.
ITS_OWN = "transformers"
ORDER, GATHERED, CHECKSUM = "sample_order", "step_statistics", "sha256"


def write(folder: Path, order: str, gathered: dict[str, Any] | None = None, **more: Any) -> None:
    """Write the notes into the folder of a checkpoint.

    Args:
        order: the name of the rule for the order of samples.
        gathered: the state of the mode's `StepStatistics`; None where it has none.
        more: other notes, as JSON values.
    """
    content = {ORDER: order} | more | ({} if gathered is None else {GATHERED: gathered})
    (folder / NOTES).write_text(json.dumps(content | {CHECKSUM: _checksum(content)}) + "\n", encoding="utf-8")


def read(checkpoint: Path) -> dict[str, Any]:
    """Return the notes of a checkpoint; none where there are none, or they are damaged."""
    return _read(checkpoint / NOTES) or {}


def order_of(checkpoint: Path) -> str:
    """Return the name of the rule by which the training that wrote a checkpoint orders its samples.

    Earlier versions wrote no notes, and had one rule.

    Raises:
        CheckpointError: the notes are damaged, or name a rule that this version does not know.
    """
    path = checkpoint / NOTES
    if not path.exists():
        return SUMMED
    if (content := _read(path)) is None:
        raise CheckpointError(
            f"{path} is damaged, so it is unknown in which order the training sees its samples. Resume "
            f"from another checkpoint, or start a new training from its weights: another --output_dir, and "
            f"{checkpoint} as --adapter_path."
        )
    found: str = content[ORDER]
    if found not in RULES:
        raise CheckpointError(
            f"{path} orders the samples by the rule {found!r}, and this version knows {', '.join(map(repr, RULES))}. A "
            "later version wrote it: resume with that one."
        )
    return found


def gathered_in(checkpoint: Path) -> dict[str, Any] | None:
    """Return the state of the mode's statistics; None where the training has none, or an earlier version wrote it."""
    content = _read(checkpoint / NOTES) or {}
    found: dict[str, Any] | None = content.get(GATHERED)
    return found


def problems(checkpoint: Path) -> list[str]:
    """Return what is wrong with the notes of a checkpoint; nothing is wrong where there are none."""
    path = checkpoint / NOTES
    return [f"{NOTES} is damaged"] if path.exists() and _read(path) is None else []


def _read(path: Path) -> dict[str, Any] | None:
    """Return the notes; None if they are missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        checksum = found.pop(CHECKSUM)
        whole = checksum == _checksum(found) and isinstance(found[ORDER], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if whole else None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
