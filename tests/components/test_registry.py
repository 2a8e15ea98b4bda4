"""Components are found by name, and a message says what is installed and which package is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkout import add_distribution

from llava_steering_plugin.components.base import Connector
from llava_steering_plugin.components.registry import CONNECTORS, LANGUAGE_MODELS, TOWERS, split
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.registered import Registered


def add(folder: Path, name: str, group: str, line: str, source: str = "") -> None:
    add_distribution(folder, name, "1.0", f"[llava_steering.{group}]\n{line}\n")
    (folder / f"{name}.py").write_text(source)


@pytest.mark.parametrize(
    ("group", "folder"), [(TOWERS, "towers"), (CONNECTORS, "connectors"), (LANGUAGE_MODELS, "language_models")]
)
def test_an_unknown_name_tells_the_nearest_one(
    group: Registered[object], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "shapes", folder, "octagonal = shapes:Octagonal")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentsError) as caught:
        group.get("octogonal")
    assert f"unknown {group.kind} 'octogonal': did you mean 'octagonal'? Registered: " in str(caught.value)
    assert group.package("octagonal") == "shapes"


def test_a_component_that_cannot_be_imported_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, "broken_parts", "connectors", "wide = broken_parts:Wide", "import no_such_module_here")
    add(tmp_path, "other_parts", "connectors", "narrow = other_parts:Narrow", "class Narrow:\n    name = 'narrow'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SteeringError, match=r"from broken_parts\) cannot be loaded: ModuleNotFoundError"):
        CONNECTORS.get("wide")
    with pytest.raises(SteeringError, match=r"from other_parts\).*no subclass of .*Connector with name") as caught:
        CONNECTORS.get("narrow")
    assert "docs/adding-a-component.md shows one" in str(caught.value)


def test_a_good_one_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from llava_steering_plugin.components.base import Connector\n"
        "class Plain(Connector):\n    name = 'plain'\n    def build(self, tokens, width):\n        return None\n"
    )
    add(tmp_path, "good_parts", "connectors", "plain = good_parts:Plain", source)
    monkeypatch.syspath_prepend(tmp_path)
    assert issubclass(CONNECTORS.get("plain"), Connector)
    assert "plain" in CONNECTORS.names()


def test_a_name_ends_at_the_first_colon() -> None:
    assert split("siglip:google/siglip-base") == ("siglip", "google/siglip-base")
    assert split("timm:local-dir:/models/vit") == ("timm", "local-dir:/models/vit")
    assert split("linear") == ("linear", "")
