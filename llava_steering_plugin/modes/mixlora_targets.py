"""Read the flag that names the linears with an adapter: `all`, or names such as `q_proj,v_proj` (MixLoRA)."""

from __future__ import annotations

from collections.abc import Sequence

from llava_steering_plugin.modes.base import LayerShape

ALL = "all"


def parse_targets(spec: str) -> list[str]:
    """Return the names in `spec`.

    Raises:
        ValueError: there are none.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if not names:
        raise ValueError(f"it is empty; write {ALL}, or names such as q_proj,v_proj")
    return names


def find_targets(spec: str, layers: Sequence[LayerShape]) -> dict[str, tuple[int, int]]:
    """Return the (in, out) features of the linears of `layers` that `spec` names, by path.

    A name is the last part of a linear's path. Vision tower, projector and language-model head are in no decoder layer.

    Raises:
        ValueError: a name that no linear has; the message says which there are.
    """
    linears = {path: features for layer in layers for path, features in layer.linears.items()}
    names, known = parse_targets(spec), {_leaf(path) for path in linears}
    unknown = [name for name in names if name != ALL and name not in known]
    if unknown or not known:
        raise ValueError(
            f"no linear of the chosen layers is called {', '.join(unknown) or 'anything'}; "
            f"there are {', '.join(sorted(known)) or 'none'}"
        )
    return {path: features for path, features in linears.items() if ALL in names or _leaf(path) in names}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
