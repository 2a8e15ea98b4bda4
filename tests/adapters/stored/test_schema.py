"""What an entry of an adapter's config may not be is one error that names it, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel, parse_llava_config
from llava_steering_plugin.errors import AdapterError

CONFIG = AdapterConfig(
    "mores",
    {"rank": 2, "tokens": "1%"},
    BaseModel("/models/base", "llama", 64, 4, 700),
    "v1",
    {"<a>": 700},
    {"bits": 4},
)
GOOD = json.loads(CONFIG.to_json())
# Values of every kind of JSON; each entry takes some of them.
ODD: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, 0.5, 1e999, -1e999, float("nan"), "", "x" * 20_000, "\0", [], [1], {},
    {"a": 1}, [[[]]],
]  # fmt: skip


def entries(data: dict[str, Any], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in data.items():
        found.append((*place, key))
        if isinstance(value, dict):
            found += entries(value, (*place, key))
    return found


def parsed(data: Any) -> AdapterConfig:
    return AdapterConfig.from_json(data if isinstance(data, str) else json.dumps(data), "the header of pets")


def set_entry(place: tuple[str, ...], *value: Any) -> Any:
    """A good config with another value at a place, or with none."""
    data = json.loads(json.dumps(GOOD))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if value:
        inner[place[-1]] = value[0]
    else:
        del inner[place[-1]]
    return data


@pytest.mark.parametrize("place", [".".join(place) for place in entries(GOOD)])
def test_any_value_anywhere_is_taken_or_is_one_error(place: str) -> None:
    for value in ODD:
        try:
            parsed(set_entry(tuple(place.split(".")), value))
        except AdapterError as error:
            assert "the header of pets" in str(error) and len(str(error)) < 1000


NEEDED = {
    "peft_type", "format_version", "mode", "settings", "base", "base_model_name_or_path", "conversation",
    "added_tokens", "trained_on", "base.model_type", "base.hidden_size", "base.num_layers", "base.vocab_size",
}  # fmt: skip


@pytest.mark.parametrize("place", [".".join(place) for place in entries(GOOD)])
def test_an_entry_that_is_missing_is_named_if_it_is_needed(place: str) -> None:
    data = set_entry(tuple(place.split(".")))
    if place in NEEDED:
        with pytest.raises(AdapterError, match=place.replace("format_version", "format")):
            parsed(data)
    else:
        parsed(data)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"conversation": 5}, "conversation is 5, not text of up to 100 characters or null"),
        ({"base": GOOD["base"] | {"hidden_size": True}}, "base.hidden_size is True, not a whole number"),
        ({"base": GOOD["base"] | {"num_layers": 0}}, "base.num_layers is 0"),
        ({"settings": {"rank": [2]}}, "settings.rank is [2], not text, a number, true, false or null"),
        ({"settings": {"rank": 10**300}}, "settings.rank is 1000"),
        ({"settings": {"dropout": float("inf")}}, "settings.dropout is inf, not a finite number"),
        ({"settings": {"layers": "0," * 10**4}}, "settings.layers is '0,0,"),
        ({"settings": {f"s{number}": 1 for number in range(1000)}}, "settings has 1,000 entries"),
        ({"added_tokens": {"<a>": 700, "<b>": 700}}, "two tokens the same id"),
        ({"added_tokens": {"": 700}}, "added_tokens has the token ''"),
        ({"added_tokens": {"\ud800": 700}}, "added_tokens has the token"),
        ({"added_tokens": {str(number): number for number in range(20_000)}}, "added_tokens has 20,000 entries"),
        ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path is"),
        ({"base_model_name_or_path": "\ud800"}, "base_model_name_or_path is"),
        ({"conversation": "\ud800"}, "conversation is"),
    ],
)  # fmt: skip
def test_types_ranges_and_lengths_are_checked(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(AdapterError) as error:
        parsed(GOOD | changes)
    assert expected in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"a":' * 200 + "1" + "}" * 200, "9" * 4301, '{"mode": ' + "9" * 4301 + "}",
     "[" + "[]," * 10**6 + "1]", " " * 2**21],
    ids=["deep", "deep tables", "digits", "digits inside", "many values", "large"],
)  # fmt: skip
def test_too_much_of_json_is_one_error(text: str) -> None:
    for parse in (lambda: parsed(text), lambda: parse_llava_config(text, "the header of pets")):
        with pytest.raises(AdapterError, match=r"the header of pets is .* [Cc]opy the adapter again"):
            parse()


def test_many_problems_are_counted() -> None:
    with pytest.raises(AdapterError) as error:
        parsed(GOOD | {"settings": {f"s{number}": [] for number in range(150)}})
    assert str(error.value).count("\n") == 21 and "and 130 more like these" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio is ['pad']"),
        ({"mm_vision_select_layer": 10**9}, "mm_vision_select_layer is 1000000000"),
        ({"mm_use_im_start_end": "yes"}, "mm_use_im_start_end is 'yes', not true or false or null"),
        ({"image_grid_pinpoints": [[336]]}, "image_grid_pinpoints is [[336]]"),
        ({"tokenizer_model_max_length": 0, "mm_patch_merge_type": 5}, "mm_patch_merge_type is 5"),
    ],
)
def test_settings_of_images_that_llava_cannot_take_are_named(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(AdapterError) as error:
        parse_llava_config(json.dumps(settings | {"hidden_act": {"anything": [1]}}), "config.json")
    assert expected in str(error.value)


def test_a_path_may_have_bytes_that_are_no_text() -> None:
    assert parsed(GOOD | {"base_model_name_or_path": "/models/\udcff"}).base.name_or_path == "/models/\udcff"


def test_settings_of_images_as_llava_writes_them_are_taken() -> None:
    settings = {
        "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 672], [672, 336]], "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False, "mm_patch_merge_type": None, "tokenizer_model_max_length": 2048, "eos": [1, {}],
    }  # fmt: skip
    assert parse_llava_config(json.dumps(settings), "config.json") == settings
    assert parse_llava_config(json.dumps({"image_grid_pinpoints": "[(336, 672)]"}), "config.json")
