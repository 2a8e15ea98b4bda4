"""Who may use the API is decided before it starts: a secret that is too short, or none where others could ask."""

from __future__ import annotations

import pytest

from llava_steering_plugin.errors import ArgumentsError, Problems, SteeringError
from llava_steering_plugin.serving import preflight
from llava_steering_plugin.serving.option_checks import checked_key, checked_token
from llava_steering_plugin.serving.options import ServeOptions

KEY = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert checked_key(ServeOptions(base="x"), host, "--host") is None
    assert checked_key(ServeOptions(base="x", api_key=KEY), host, "--host") == KEY


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gpu-3.example"])
def test_other_machines_need_a_key_or_the_word_that_they_need_none(host: str) -> None:
    with pytest.raises(ArgumentsError, match=rf"^--api-host {host} lets other machines .*LLAVA_STEERING_API_KEY"):
        checked_key(ServeOptions(base="x"), host, "--api-host")
    assert checked_key(ServeOptions(base="x", api_key=KEY), host, "--host") == KEY
    assert checked_key(ServeOptions(base="x", no_api_key=True), host, "--host") is None


def test_secrets_that_are_too_short_are_refused() -> None:
    with pytest.raises(ArgumentsError, match="the API key has 5 characters; it needs 16 at least"):
        checked_key(ServeOptions(base="x", api_key="short"), "127.0.0.1", "--host")
    with pytest.raises(ArgumentsError, match="the admin token has 5 characters"):
        checked_token("short")
    with pytest.raises(ArgumentsError, match="--api-key and --no-api-key are both given"):
        checked_key(ServeOptions(base="x", api_key=KEY, no_api_key=True), "127.0.0.1", "--host")


def said(**options: object) -> str:
    problems = Problems()
    preflight.check_api(ServeOptions(base="x", **options), "0.0.0.0", "--host", problems)  # type: ignore[arg-type]
    try:
        problems.raise_any("all")
    except SteeringError as error:
        return str(error)
    return ""


def test_all_that_is_wrong_with_the_api_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "missing_libraries", list)
    wrong = said(allowed_media_domains=["https://x/"], allowed_local_media_path="/nowhere/at/all")
    assert "--host 0.0.0.0 lets other machines" in wrong
    assert "--allowed-media-domains https://x/: give a host" in wrong
    assert "--allowed-local-media-path /nowhere/at/all is no folder" in wrong


def test_without_its_packages_flags_of_the_api_are_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "API_LIBRARIES", {"no_such_module": "no-such-package"})
    assert said() == ""
    assert said(api_key=KEY).startswith("--api-key: the API under /v1 needs no-such-package, not installed here.")
