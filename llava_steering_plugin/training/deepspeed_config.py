"""Read the JSON file of `--deepspeed`, as far as the flags and the plan need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError

ZERO = "zero_optimization"


def read_deepspeed(path: str) -> dict[str, Any]:
    """Return DeepSpeed's settings; `zero_optimization` is a dict whose `stage` is a number.

    Raises:
        ArgumentsError: the file cannot be read, or DeepSpeed would not take it.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"--deepspeed {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ArgumentsError(f"--deepspeed {path} holds no JSON object but {_kind(config)}")
    zero = {} if config.get(ZERO) is None else config[ZERO]
    if not isinstance(zero, dict):
        raise ArgumentsError(f"--deepspeed {path}: its {ZERO} is no JSON object but {_kind(zero)}")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise ArgumentsError(f"--deepspeed {path}: the stage of its {ZERO} is {stage!r}; it must be 0, 1, 2 or 3")
    return {**config, ZERO: {**zero, "stage": stage}}


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
