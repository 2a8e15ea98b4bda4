"""What the pages say of the package is what the package says: its rooms, the modes' flags, limits and messages."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from llava_steering_plugin import MixLoRA, Mode, MoReS
from llava_steering_plugin.serving.http.limits import Limits

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_steering_plugin"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODES = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
LIMITS = (ROOT / "docs" / "serving-limits.md").read_text(encoding="utf-8")

# Defaults that depend on other settings: what the page says in their place.
DEPENDING = {
    "mixlora_alpha": "twice the factors",
    "mixlora_routing": "prompt",
    "mixlora_router_grad": "straight_through",
    "mixlora_balance": "0.05 where routers learn",
}


def section(page: str, heading: str) -> str:
    """Return what stands below a heading of the second level."""
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def guarded_floors() -> list[set[str]]:
    """Return `FLOORS` of test_architecture.py, from the ground up."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (floors,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "FLOORS"]
    return [set(rooms) for rooms in ast.literal_eval(floors)]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_order_of_the_rooms_is_the_one_that_is_guarded() -> None:
    found = PACKAGE.iterdir()
    there = {path.stem for path in found if path.suffix == ".py" or (path / "__init__.py").exists()}
    (drawing,) = re.findall(r"^    cli > .*\n(?: +>.*\n)*", ARCHITECTURE, re.MULTILINE)
    drawn = [set(re.findall(r"\w+", floor)) for floor in drawing.split(">")]
    floors = [floor & there for floor in reversed(guarded_floors())]
    assert drawn == [floor for floor in floors if floor and floor != {"__main__"}]


def test_every_room_has_a_row_that_lists_its_files() -> None:
    listed = set()
    for room, _, files in rows(section(ARCHITECTURE, "The rooms")):
        names = re.findall(r"`(\w+\.py)`", files)
        listed |= {room.strip("`") + name for name in names} or {room.strip("`")}
    there = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("[!_]*.py")}
    assert sorted(there - listed) == [], "add these files to the table of rooms in docs/architecture.md"
    assert sorted(listed - there) == [], "take these files out of the table of rooms in docs/architecture.md"


def test_the_page_shows_where_a_newcomer_looks_first() -> None:
    guide = section(ARCHITECTURE, "Where to look")
    for topic in ("flag of MoReS", "adapter is refused", "body", "which tokens are visual", "memory table"):
        assert topic in guide


@pytest.mark.parametrize("mode", [MoReS, MixLoRA])
def test_the_page_of_the_modes_lists_every_flag_with_its_default(mode: type[Mode]) -> None:
    listed = {row[0].strip("`").removeprefix("--"): row[1].strip("`") for row in rows(section(MODES, mode.__name__))}
    fields = {f"{mode.name}_{field.name}": field.default for field in dataclasses.fields(mode)}
    assert listed.keys() == fields.keys()
    for name, default in fields.items():
        if name in DEPENDING:
            assert default is None and listed[name] == DEPENDING[name]
        else:
            assert listed[name] == (f"{default:g}" if isinstance(default, float) else str(default)), name


def test_the_page_of_the_servers_limits_has_the_limits_of_a_worker() -> None:
    listed = {row[0].strip("`"): row[1] for row in rows(section(LIMITS, "Limits"))}
    limits = Limits()
    for flag, start in {
        "--limit-model-concurrency": f"{limits.running} batches",
        "--batch": f"{limits.batch} answers",
        "--limit-queue": f"{limits.waiting} requests",
        "--limit-body-mb": f"{limits.body_bytes >> 20} MB",
        "--limit-prompt": f"{limits.prompt_characters:,} characters",
        "--limit-pixels": f"{limits.image_pixels:,} of an image",
        "--stall-seconds": f"{limits.stall_seconds:g} s",
    }.items():
        assert listed.pop(flag).startswith(start), flag
    assert listed == {}
    assert f"| images of a request | {limits.images}," in LIMITS
    assert f"| time for a request to arrive | {limits.receive_seconds:g} s |" in LIMITS


def texts_of_the_package() -> str:
    """Return all strings in the package's source; what an f-string fills in is left out."""
    nodes = (node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_every_message_under_troubleshooting_is_one_of_the_package() -> None:
    quoted = [row[0].strip("`") for row in rows(section(README, "Troubleshooting")) if "..." in row[0]]
    assert len(quoted) > 3
    parts = [part.strip() for message in quoted for part in re.split(r"\.\.\.|\d+", message) if part.strip()]
    texts = texts_of_the_package()
    assert [part for part in parts if part not in texts] == []
