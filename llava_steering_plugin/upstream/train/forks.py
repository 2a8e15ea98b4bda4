"""Do for a training in LLaVA-NeXT what LLaVA's own needs no help for; say what its train() would do wrong.

LLaVA-NeXT chooses the class of a model, and its tokenizer, by words in the path of the base. It says what is trained
with `--mm_tunable_parts`, by which the flag is known here.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from llava_steering_plugin.upstream.model.language_models import own_class, replaced
from llava_steering_plugin.upstream.startup import flag_value
from llava_steering_plugin.upstream.train_source import broken_trainer

PARTS = "mm_tunable_parts"
PROJECTOR_ALONE = "mm_mlp_adapter"
# By which words in the path of a base its train() chooses the LLaVA, in this order.
_WORDS = {
    "llava_mixtral": ("mixtral",),
    "llava_mistral": ("mistral", "zephyr"),
    "llava_llama": ("wizardlm-2", "vicuna", "llama", "yi"),
    "llava_qwen": ("qwen",),
}


def is_next(flags: Namespace) -> bool:
    """Return whether a training's flags are those of LLaVA-NeXT."""
    return hasattr(flags, PARTS)


def problems_of_fork(flags: Namespace, llava: Path, described: Mapping[str, Any] | None) -> list[str]:
    """Return what keeps a training with a mode from working in LLaVA-NeXT; nothing for LLaVA.

    Args:
        flags: of the training.
        llava: the folder of the package.
        described: config.json of the base; None if it cannot be read, or a component makes its LLaVA.
    """
    if not is_next(flags):
        return []
    problems = list(filter(None, [broken_trainer(llava)]))
    if flags.vision_tower and flags.model_name_or_path:
        problems += _misleading_path(str(flags.model_name_or_path), described)
    data = str(getattr(flags, "data_path", None) or "")
    if data.endswith(".yaml") or "{" in data:
        problems.append(
            f"--data_path {data}: LLaVA-NeXT joins several files there, and a tuning mode needs one, whose samples it "
            "can number: join them into one JSON list"
        )
    return problems


def _misleading_path(path: str, described: Mapping[str, Any] | None) -> list[str]:
    own = None if described is None else own_class(str(described["model_type"]))
    wanted = str(own.config_class.model_type).replace("llava_qwen_moe", "llava_qwen") if own else "llava_llama"
    found = next(((kind, word) for kind, words in _WORDS.items() for word in words if word in path.lower()), None)
    if wanted not in _WORDS or (found is not None and found[0] == wanted):
        return []
    has = "it has none of its words" if found is None else f"for {found[1]!r} in it, it would take {found[0]}"
    return [
        f"--model_name_or_path {path}: LLaVA-NeXT chooses the model's class by words in this path, and {has}. This is "
        f"a base for {wanted}: give a path, such as a relative one or a link, in which {' or '.join(_WORDS[wanted])} "
        "is the first of them"
    ]


def mapped(words: Sequence[str]) -> list[str]:
    """Return a command line without `--mm_tunable_parts mm_mlp_adapter`, which is what a tuning mode trains anyway.

    With the flag, LLaVA-NeXT would write checkpoints of the projector alone.
    """
    if flag_value(words, f"--{PARTS}") != PROJECTOR_ALONE:
        return list(words)
    left = [word for word in words if word != f"--{PARTS}={PROJECTOR_ALONE}"]
    if f"--{PARTS}" in left:
        at = left.index(f"--{PARTS}")
        del left[at : at + 2]
    return left


@contextmanager
def with_own_config(module: ModuleType, flags: Namespace, described: Mapping[str, Any] | None) -> Iterator[None]:
    """Have LLaVA-NeXT build a LLaVA from a config of its own kind.

    It takes that of the plain language model, which an adapter's config.json would then be.

    Args:
        module: `llava.train.train`.
        flags: of a training with a mode.
        described: config.json of the base; None if it cannot be read, or a component makes its LLaVA.
    """
    own = own_class(str(described["model_type"])) if is_next(flags) and described is not None else None
    if own is None:
        yield
        return
    with replaced(module, AutoConfig=SimpleNamespace(from_pretrained=own.config_class.from_pretrained)):
        yield


def folder_of(module: ModuleType) -> Path:
    """Return the folder of the package that `llava.train.train`, the module, belongs to."""
    return Path(os.fspath(module.__file__ or "")).parents[1]
