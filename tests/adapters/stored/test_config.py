"""The config of an adapter: what other formats and other versions of this one mean for a reader."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava_steering_plugin import __version__
from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.errors import AdapterError

CONFIG = AdapterConfig(
    "mores", {"rank": 2}, BaseModel("/models/base", "llama", 64, 4, 700), "v1", {"<a>": 700}, {"bits": 4}
)


def parse(**changes: Any) -> AdapterConfig:
    return AdapterConfig.from_json(json.dumps(json.loads(CONFIG.to_json()) | changes), "the header of pets")


def refusal(**changes: Any) -> str:
    with pytest.raises(AdapterError) as error:
        parse(**changes)
    return str(error.value)


def test_a_config_comes_back_as_it_was_written() -> None:
    assert AdapterConfig.from_json(CONFIG.to_json(), "pets") == CONFIG


def test_keys_that_a_later_version_of_format_1_adds_are_ignored() -> None:
    assert parse(licence="MIT", notes={"any": ["thing"]}) == CONFIG
    base = json.loads(CONFIG.to_json())["base"]
    assert parse(base=base | {"revision": "main"}) == CONFIG


def test_a_later_format_is_refused_with_the_version_that_wrote_it_whatever_else_it_holds() -> None:
    said = refusal(format_version=3, plugin_version="9.1", settings=["another", "form"], base=None)
    assert said == (
        f"the header of pets has adapter format 3; this is llava-steering-plugin {__version__}, which reads formats 1 "
        "and 2. Install version 9.1, which wrote it, or a newer one: pip install -U 'llava-steering-plugin>=9.1'."
    )


@pytest.mark.parametrize("writer", [None, 3, "unknown", "1; rm -rf /", __version__])
def test_a_later_format_of_no_known_version_is_refused_with_the_command_for_the_newest(writer: object) -> None:
    said = refusal(format_version=3, plugin_version=writer)
    assert "adapter format 3" in said
    assert said.endswith("Install a newer one: pip install -U 'llava-steering-plugin'.")


@pytest.mark.parametrize("number", [0, -1, "1", 1.0, True, None, [2]])
def test_a_number_that_is_no_format_is_damage_and_not_a_matter_of_versions(number: object) -> None:
    said = refusal(format_version=number)
    assert f"adapter format {number!r}" in said and "damaged" in said
    assert "pip" not in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mode": None, "settings": []}, ("mode is None", "settings is []")),
        ({"base": {"hidden_size": "64"}}, ("base.model_type is None", "base.hidden_size is '64'")),
        ({"added_tokens": {"<a>": -1, "<b>": True}}, ("added_tokens.<a> is -1", "added_tokens.<b> is True")),
    ],
)
def test_all_entries_that_are_missing_or_wrong_are_named(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    said = refusal(**changes)
    assert "damaged or was edited by hand" in said
    for words in expected:
        assert words in said


@pytest.mark.parametrize("text", ["[]", "{}", '{"peft_type": "LORA"}', '{"peft_type": 1}', "null"])
def test_what_is_not_ours_is_said_to_be_of_another_library(text: str) -> None:
    with pytest.raises(AdapterError, match=r"^pets is not an adapter of this plugin: peft_type is .* Load it with"):
        AdapterConfig.from_json(text, "pets")


@pytest.mark.parametrize("text", ["", "{", "\ufffd"])
def test_what_is_not_json_is_damaged(text: str) -> None:
    with pytest.raises(AdapterError, match=r"^pets is not JSON: .* copy the adapter again"):
        AdapterConfig.from_json(text, "pets")
