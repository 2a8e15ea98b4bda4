"""Read and check `--peft_method` and `--peft_config`: which of PEFT's methods train here, and with which settings."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llava_steering_plugin.errors import nearest

# The methods that are tried here, beside LoRA with its option DoRA. Each adds to linears what a base can do without.
METHODS = ("ia3", "loha", "lokr", "lora", "oft")
_IN_PROMPTS = "it adds vectors to prompts or to attention, and this mode tunes linears"
# Other methods of PEFT's, and why they do not train here.
NOT_HERE = {
    "adalora": "it needs a training loop that calls its update_and_allocate() after every step",
    "adaption_prompt": _IN_PROMPTS,
    "dora": "it is an option of LoRA: --peft_method lora --peft_config '{\"use_dora\": true}'",
    "multitask_prompt_tuning": _IN_PROMPTS,
    "p_tuning": _IN_PROMPTS,
    "poly": "it needs the number of the task with every sample",
    "prefix_tuning": _IN_PROMPTS,
    "prompt_tuning": _IN_PROMPTS,
}
# PEFT's word for all linears, which all methods may use here.
ALL = "all-linear"
# What a file or an object of PEFT's says that is no setting of the method, or only Megatron's. `peft_type` is compared
# with --peft_method; `runtime_config` is how PEFT itself would run it, and PEFT saves none.
_OF_THE_FILE = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type"),
    *("peft_version", "revision", "runtime_config", "task_type"),
)
_IDENTITY = "a fresh adapter must leave the base's answers as they are"
_BASE = "it would change the base itself, which adapters share"
# Settings that cannot be used here: the values that can, and why no others.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), _BASE),
    "fan_in_fan_out": ((False,), "the linears of a decoder do not hold their weights transposed"),
    "init_ia3_weights": ((True,), _IDENTITY),
    "init_lora_weights": ((True, "gaussian"), _IDENTITY + ", and its weights too"),
    "init_weights": ((True,), _IDENTITY),
    "layer_replication": ((None, []), _BASE),
    "loftq_config": ((None, {}), _BASE),
    "megatron_config": ((None,), "no model of Megatron's is trained here"),
    "module_dropout": (
        (0, None),
        "parameters that a step leaves out get no gradient there, and other ranks would wait for one",
    ),
    "modules_to_save": ((None, []), _BASE + ". The projector is trained without it"),
}
LONGEST = 10_000  # characters of a setting in an adapter's config


def version() -> str:
    """Return the version of PEFT that is installed."""
    import peft

    return str(peft.__version__)


def config_class(method: str) -> Any:
    """Return PEFT's class of a method's settings; None if the installed version has no such method."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    name = method.upper()
    return PEFT_TYPE_TO_CONFIG_MAPPING.get(name) if name in PEFT_TYPE_TO_TUNER_MAPPING else None


def method_problems(method: str) -> list[str]:
    """Return why a method cannot be trained here; nothing if it can."""
    if find_spec("peft") is None:
        return ["tuning_mode peft needs PEFT, which is not installed: pip install 'llava-steering-plugin[peft]'"]
    from peft import PeftType

    there = [name for name in METHODS if config_class(name) is not None]
    if method in there:
        return []
    known = f"methods that train here, with PEFT {version()}: {', '.join(there)}"
    if method in NOT_HERE:
        return [f"peft_method {method} is refused: {NOT_HERE[method]}; {known}"]
    if method.upper() in PeftType.__members__:
        return [f"peft_method {method} is refused: PEFT has it, and it has not been tried with this package; {known}"]
    return [f"peft_method {method} is unknown; {nearest(method, there)}{known}"]


def read_config(text: str | None) -> dict[str, Any]:
    """Return the object of JSON in `text`.

    Raises:
        ValueError: there is none; the message says what there is.
    """
    if text is None:
        return {}
    if not text.lstrip().startswith("{"):
        raise ValueError(f"{text!r:.200} is neither JSON in braces nor a file that can be read")
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and {LONGEST:,} are allowed")
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    return dict(found)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a valid number")


def completed(method: str, text: str | None) -> str | None:
    """Return a config with all settings that count, so that a default which changes later changes no adapter.

    Settings that are nothing by default, and here, are left out. What cannot be read comes back as it is.
    """
    if method_problems(method):
        return text
    try:
        given = read_config(text)
    except ValueError:
        return text
    if _kind(given) not in (None, method):
        return text
    defaults = _defaults(method)
    values = defaults | {name: value for name, value in given.items() if name not in _OF_THE_FILE}
    counting = {
        name: value
        for name, value in values.items()
        if name not in defaults or value != defaults[name] or not (value is None or value is False or value in ([], {}))
    }
    return json.dumps(counting, sort_keys=True)


def _kind(given: Mapping[str, Any]) -> str | None:
    """Return the method that a file of PEFT's is of; None if it does not say so."""
    kind = given.get("peft_type")
    return None if kind is None else str(kind).lower()


def _defaults(method: str) -> dict[str, Any]:
    kind = config_class(method)
    described = json.loads(json.dumps(dataclasses.asdict(kind()), default=list))
    return {name: value for name, value in described.items() if name not in _OF_THE_FILE}


def config_problems(method: str, text: str | None) -> list[str]:
    """Return everything wrong with a config, one sentence each, as far as it shows without a model.

    Args:
        method: one that trains here.
        text: as it was given.
    """
    try:
        given = read_config(text)
    except ValueError as error:
        return [f"peft_config: {error}"]
    problems = []
    if (kind := _kind(given)) not in (None, method):
        problems.append(f"peft_config is that of {kind:.100}, and peft_method is {method}")
    defaults, hints = _defaults(method), get_type_hints(config_class(method))
    for name, value in given.items():
        if name in _OF_THE_FILE:
            continue
        if name not in defaults:
            hint = f"; {found}".rstrip() if (found := nearest(name, defaults)) else ""
            problems.append(f"peft_config: {name:.100} is no setting of {method} in PEFT {version()}{hint}")
        elif name in _REFUSED and value not in _REFUSED[name][0]:
            problems.append(f"peft_config: {name} {_shown(value)} cannot be used here: {_REFUSED[name][1]}")
        elif not _is_a(value, hints[name]):
            problems.append(f"peft_config: {name} is {_shown(value)}, where {_spelled(hints[name])} is expected")
        elif name.endswith("dropout") and not 0 <= value < 1:
            problems.append(f"peft_config: {name} is {value}; it must be at least 0 and below 1")
    return problems


def as_peft(method: str, text: str | None) -> Any:
    """Return PEFT's own object of settings.

    Raises:
        ValueError, TypeError: PEFT refuses them.
    """
    given = {name: value for name, value in read_config(text).items() if name not in _OF_THE_FILE}
    if given.get("target_modules") == ALL:
        del given["target_modules"]
    return config_class(method)(task_type="CAUSAL_LM", **given)


def _is_a(value: object, hint: Any) -> bool:
    """Tell whether a value of JSON is of a type, as annotations of PEFT's spell types."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if hint is type(None):
        return value is None
    if origin in (list, tuple, set):
        return isinstance(value, list) and all(_is_a(each, inner[0]) for each in value if inner)
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str, dict):
        return type(value) is hint
    return True  # PEFT itself says what it expects of the rest


def _shown(value: object) -> str:
    return f"{json.dumps(value):.100}"


def _spelled(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spelled(each) for each in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    return "null" if hint is type(None) else f"a list of {_spelled(inner[0])}" if inner else hint.__name__
