"""The layout of the package: which room may import which, who may name LLaVA and DeepSpeed, how long a file may be.

Also: every module has its tests, docstrings begin with a verb, and the package exports the names that it promises.

docs/architecture.md describes the rooms. These tests read the source; only the last one imports it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llava_steering_plugin

ROOT = Path(__file__).parents[1]
PACKAGE = "llava_steering_plugin"

# From the ground up. A room imports rooms of lower floors only; rooms of one floor know nothing of each other.
FLOORS = (
    ("errors", "lazy_imports", "whole_files"),
    ("distributed", "registered", "figures", "hub", "foreign_files"),
    ("modes", "components"),
    ("hooks",),
    ("adapters", "measures"),
    ("training", "convert", "pool", "vllm"),
    ("upstream",),
    ("planning", "checkout", "inference", "launch"),
    ("serving", "chat", "evaluation", "diagnostics", "comparison", "export"),
    ("harness",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Who calls LLaVA's own functions. Everybody else gets what it needs of LLaVA from these rooms, or from the model.
MAY_IMPORT_LLAVA = {"upstream", "inference", "chat", "serving", "export"}
# The constant that stands for an image in a prompt: below `upstream`, which therefore cannot hand it down.
LLAVA_CONSTANTS = {"pool/projectors.py"}

LONGEST_FILE = 300


EXPORTED = {
    "AdapterConfig",
    "AdapterError",
    "AdapterPool",
    "ArgumentsError",
    "Attachment",
    "BaseMismatch",
    "CheckpointError",
    "DataError",
    "NotFiniteError",
    "NotFiniteWarning",
    "ForwardPass",
    "MixLoRA",
    "MoReS",
    "Mode",
    "SteeringError",
    "SteeringTrainerMixin",
    "TokenMapError",
    "UpstreamError",
    "__version__",
    "attach",
    "attachment_of",
    "chat_template_of",
    "disable_adapter",
    "disabled",
    "from_pretrained",
    "get_model",
    "joint",
    "load_adapter",
    "remove",
    "remove_adapter",
    "save_adapter",
    "setting",
    "token_map",
    "use_adapter",
    "using",
}


def module_files(root: Path) -> dict[str, Path]:
    """Return the dotted name of every module below `root`, a folder that holds the package."""
    found = {}
    for file in sorted((root / PACKAGE).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported_names(file: Path, root: Path) -> set[str]:
    """Return the dotted names of everything that a file imports, anywhere in it, relative imports resolved."""
    names = set()
    package = file.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            near = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            origin = ".".join(filter(None, (near, node.module)))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    files = module_files(root)

    def modules(names: Iterable[str]) -> set[str]:
        found = set()
        for name in names:
            while name and name not in files:
                name = name.rpartition(".")[0]
            found.add(name)
        return found - {"", PACKAGE}

    return {name: modules(imported_names(file, root)) - {name} for name, file in files.items()}


def room_of(module: str) -> str:
    """Return the part of the package that a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def arrows_up(graph: Mapping[str, set[str]]) -> list[str]:
    """Return every import from one room into a room that is not below it."""
    return [
        f"{module} -> {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room_of(module) not in ("", room_of(other)) and LEVEL[room_of(other)] >= LEVEL[room_of(module)]
    ]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(ROOT)


def test_every_part_of_the_package_has_a_floor(graph: dict[str, set[str]]) -> None:
    assert {room_of(module) for module in graph} - {""} <= LEVEL.keys()


def test_no_import_runs_up_or_to_a_neighbour(graph: dict[str, set[str]]) -> None:
    assert arrows_up(graph) == []


def test_no_imports_go_in_a_circle_not_even_for_annotations(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_guards_see_a_circle_and_an_arrow_that_runs_up(tmp_path: Path) -> None:
    for path, source in {
        "__init__.py": "",
        "modes/__init__.py": "",
        "modes/mores.py": "def later():\n    from ..adapters import card\n",
        "adapters/__init__.py": "",
        "adapters/card.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..modes.mores import later\n",
    }.items():
        file = tmp_path / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    found = import_graph(tmp_path)
    assert arrows_up(found) == [f"{PACKAGE}.modes.mores -> {PACKAGE}.adapters.card"]
    with pytest.raises(CycleError):
        TopologicalSorter(found).prepare()


def top_packages(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(file, ROOT)}


def test_only_the_rooms_that_run_llava_import_it() -> None:
    importers = {
        str(file.relative_to(ROOT / PACKAGE)) for file in module_files(ROOT).values() if "llava" in top_packages(file)
    }
    assert {path for path in importers if path.split("/")[0] not in MAY_IMPORT_LLAVA} == LLAVA_CONSTANTS


def test_modes_are_plain_torch_and_two_files_name_deepspeed() -> None:
    files = module_files(ROOT)
    assert not [
        file for name, file in files.items() if room_of(name) == "modes" and "transformers" in top_packages(file)
    ]
    naming = {name.removeprefix(f"{PACKAGE}.") for name, file in files.items() if "deepspeed" in top_packages(file)}
    assert naming == {"distributed", "training.deepspeed"}


@pytest.mark.parametrize("folder", [PACKAGE, "scripts"])
def test_no_file_is_longer_than_can_be_surveyed(folder: str) -> None:
    lengths = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {str(file): length for file, length in lengths.items() if length > LONGEST_FILE} == {}


def has_code(file: Path) -> bool:
    """Say whether a file holds more than a docstring."""
    body = ast.parse(file.read_text()).body
    return len(body) > (ast.get_docstring(ast.parse(file.read_text())) is not None)


def test_every_module_has_a_test_file_that_one_finds_by_its_name_or_that_names_it() -> None:
    """tests/ROOM/test_MODULE.py, or a test file whose docstring holds `ROOM/MODULE.py` or `ROOM.MODULE`."""
    described = [ast.get_docstring(ast.parse(file.read_text())) or "" for file in (ROOT / "tests").rglob("test_*.py")]
    untested = set()
    for name, file in module_files(ROOT).items():
        path = file.relative_to(ROOT / PACKAGE)
        dotted = re.escape(name.removeprefix(f"{PACKAGE}."))
        named = re.compile(rf"(?<![\w/.])({re.escape(str(path))}|{dotted})(?![\w/]|\.\w)")
        own = ROOT / "tests" / path.with_name(f"test_{name.rpartition('.')[2]}.py")
        if has_code(file) and name != PACKAGE and not own.is_file() and not any(map(named.search, described)):
            untested.add(str(path))
    assert untested == set(), "write tests, or name the module in the docstring of its tests"


def public_docstrings(tree: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of a module or class and of all that is public in it, with the names they stand under."""
    yield name, ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_docstrings(node, f"{name}.{node.name}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", ast.get_docstring(node) or ""


def test_docstrings_begin_with_a_verb_and_not_with_a_question() -> None:
    found = {
        name
        for module, file in module_files(ROOT).items()
        for name, text in public_docstrings(ast.parse(file.read_text()), module)
        if re.match(r"(What|Whether|Who|Whose|Whoever|Where|Which|How)\b", text)
    }
    assert sorted(found) == []


def test_the_package_exports_these_names_and_no_others() -> None:
    """Add to this list with a new name; taking one out breaks somebody's program."""
    assert set(llava_steering_plugin.__all__) == EXPORTED
    assert all(hasattr(llava_steering_plugin, name) for name in EXPORTED)
