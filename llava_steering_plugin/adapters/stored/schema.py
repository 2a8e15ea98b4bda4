"""Says what the entries of an adapter's config and of its LLaVA config may be: types, ranges, and lengths.

`config.py` checks by it whatever it reads. Keys that are not listed here are not looked at: later versions may add
some, and LLaVA's config has many that no adapter depends on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from llava_steering_plugin.foreign_files import brief

# A check returns what is expected, or the empty string if the value is that.
Check = Callable[[Any], str]

LONGEST_TEXT = 10_000
LONGEST_PATH = 4096
LARGEST_SIZE = 2**31 - 1  # layers, widths and rows of models
LARGEST_INTEGER = 2**63 - 1
MOST_TOKENS = 10_000
MOST_SETTINGS = 200


def text(longest: int, *, empty: bool = True) -> Check:
    """Return a check for strings of at most `longest` characters, without the character 0 and halves of others."""

    def check(value: Any) -> str:
        right = isinstance(value, str) and len(value) <= longest and (empty or value) and _is_text(value)
        return "" if right else f"text of up to {longest:,} characters"

    return check


def _is_text(value: str) -> bool:
    try:
        # The name of a file may have bytes that are no text; Python keeps them like this.
        return "\0" not in value and value.encode(errors="surrogateescape") is not None
    except UnicodeEncodeError:
        return False


def number(least: int, most: int = LARGEST_SIZE) -> Check:
    """Return a check for integers; True and False are none."""

    def check(value: Any) -> str:
        return "" if type(value) is int and least <= value <= most else f"a whole number from {least:,} to {most:,}"

    return check


def either(*checks: Check) -> Check:
    """Return a check for what one of the others takes."""

    def check(value: Any) -> str:
        expected = [each(value) for each in checks]
        return "" if "" in expected else " or ".join(expected)

    return check


def optional(check: Check) -> Check:
    """Return a check that takes null, too."""
    return lambda value: "" if value is None else f"{expected} or null" if (expected := check(value)) else ""


def boolean(value: Any) -> str:
    """Check for true or false."""
    return "" if isinstance(value, bool) else "true or false"


def scalar(value: Any) -> str:
    """Check for what a setting of a mode may be: text, a finite number, true, false or null."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, str):
        return text(LONGEST_TEXT)(value)
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a finite number"
    if isinstance(value, int):
        return "" if -LARGEST_INTEGER <= value <= LARGEST_INTEGER else "a number of up to 63 bits"
    return "text, a number, true, false or null"


def beginning_of_names(value: Any) -> str:
    """Check for what names of tensors of PEFT's begin with: its wrapper, and perhaps where the decoder is in it."""
    right = isinstance(value, str) and len(value) <= 100 and re.fullmatch(r"base_model\.model\.(\w+\.)*", value)
    return "" if right else "the beginning of names of PEFT's, base_model.model. and so on"


def table(value: Any) -> str:
    """Check for an object of JSON."""
    return "" if isinstance(value, dict) else "a table"


def sizes(value: Any) -> str:
    """Check for a list of pairs of lengths, such as LLaVA's `image_grid_pinpoints`."""
    pair = number(1)
    right = isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 2 and not any(map(pair, each)) for each in value
    )
    return "" if right else "a list of pairs of lengths"


_CONFIG: dict[str, Check] = {
    "mode": text(100, empty=False),
    "settings": table,
    "base": table,
    "base_model_name_or_path": text(LONGEST_PATH),
    "conversation": optional(text(100)),
    "added_tokens": table,
    "trained_on": table,
}
# Those that an older version did not write.
_LATER: dict[str, Check] = {"chat_template": optional(text(LONGEST_TEXT))}
# The entries of `base`.
BASE: dict[str, Check] = {
    "model_type": text(100, empty=False),
    "hidden_size": number(1),
    "num_layers": number(1),
    "vocab_size": number(1),
}
# What `upstream.model.loading` sets in a model's config, and a pool compares with it.
_LLAVA: dict[str, Check] = {
    "image_aspect_ratio": optional(text(100)),
    "image_crop_resolution": optional(number(1)),
    "image_grid_pinpoints": optional(either(sizes, text(LONGEST_TEXT))),
    "image_split_resolution": optional(number(1)),
    "mm_patch_merge_type": optional(text(100)),
    "mm_use_im_patch_token": optional(boolean),
    "mm_use_im_start_end": optional(boolean),
    "mm_vision_select_feature": optional(text(100)),
    "mm_vision_select_layer": optional(number(-1000, 1000)),
    "tokenizer_model_max_length": optional(number(1)),
    "tokenizer_padding_side": optional(text(100)),
}


def config_problems(data: Mapping[str, Any], *, named_by_peft: bool = False) -> list[str]:
    """Return everything wrong with an adapter's config.

    Args:
        named_by_peft: its tensors have the names of PEFT's.
    """
    later = {key: check for key, check in _LATER.items() if key in data}
    problems = _wrong(data, _CONFIG | later | ({"peft_prefix": beginning_of_names} if named_by_peft else {}))
    for name, check in (("settings", scalar), ("trained_on", scalar)):
        if isinstance(entries := data.get(name), dict):
            problems += _too_many(name, entries, MOST_SETTINGS) or _wrong(entries, dict.fromkeys(entries, check), name)
    if isinstance(base := data.get("base"), dict):
        problems += _wrong(base, BASE, "base")
    if isinstance(tokens := data.get("added_tokens"), dict):
        problems += _too_many("added_tokens", tokens, MOST_TOKENS) or _wrong_tokens(tokens)
    return problems


def llava_problems(described: Mapping[str, Any]) -> list[str]:
    """Return everything wrong with those settings of a LLaVA config that decide how images and prompts are cut."""
    return _wrong(described, {key: check for key, check in _LLAVA.items() if key in described})


def _wrong(data: Mapping[str, Any], checks: Mapping[str, Check], place: str = "") -> list[str]:
    prefix = f"{place}." if place else ""
    return [
        f"{prefix}{_shown(key)} is {brief(data.get(key))}" + (f", not {expected}" if key in data else " or missing")
        for key, check in checks.items()
        if (expected := "it" if key not in data else check(data[key]))
    ]


def _wrong_tokens(tokens: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with added tokens: text, each with an id of its own."""
    problems = _wrong(tokens, dict.fromkeys(tokens, number(0)), "added_tokens")
    problems += [f"added_tokens has the token {brief(token)}" for token in tokens if not _is_token(token)]
    if not problems and len(set(tokens.values())) < len(tokens):
        problems.append("added_tokens gives two tokens the same id")
    return problems


def _is_token(token: str) -> bool:
    try:
        return 0 < len(token.encode()) <= 1000 and "\0" not in token
    except UnicodeEncodeError:
        return False


def _too_many(name: str, entries: Mapping[str, Any], most: int) -> list[str]:
    return [f"{name} has {len(entries):,} entries, more than {most:,}"] if len(entries) > most else []


def _shown(key: str) -> str:
    return key if len(key) <= 100 else brief(key)
