"""`upstream/seams.py` lists each name of LLaVA that the package uses, and what it overrides in transformers.

Covers `upstream/trainer_seams.py` and `upstream/source.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.upstream.seams import COMMANDS, SEAMS, Seam, missing_seams, require
from llava_steering_plugin.upstream.source import defined_names, module_file, package_folder

PACKAGE = Path(__file__).parents[2] / "llava_steering_plugin"
LISTS = ("seams.py", "trainer_seams.py")
# A class is listed with its members.
LISTED = {f"{seam.module}.{name}" for seam in SEAMS for name in (seam.attribute, seam.attribute.split(".")[0])}
# Rooms whose code serves one command alone.
COMMAND_OF = {"training": "train", "planning": "plan", "chat": "chat", "serving": "serve", "diagnostics": "diagnose"}
# Members of LLaVA's classes whose names other objects have, too; and the constructor.
COMMON = {"__init__", "config", "model", "forward", "generate", "vocab_size", "lm_head", "vision_tower", "config_class"}


# What our files call modules of other packages in which they replace something: gradio, gradio.routes, uvicorn.
NOT_OF_LLAVA = ("gradio", "routes", "uvicorn")


class Uses(ast.NodeVisitor):
    """Collects the names of LLaVA that a file uses, each as "module.name"."""

    def __init__(self, llava: Path):
        self.llava = llava
        self.modules: dict[str, str] = {}  # by the name that the file gives them
        self.constants: dict[str, str] = {}
        self.names: set[str] = set()
        self.fetched: set[str] = set()  # names given to `require` and to wrapt, of whichever module

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module is None or node.module.split(".")[0] != "llava":
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if module_file(self.llava, name):
                self.modules[alias.asname or alias.name] = name
            else:
                self.names.add(name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        target = node.targets[0]
        if isinstance(target, ast.Name):
            if isinstance(node.value, ast.Constant) and self._is_module(node.value.value):
                self.constants[target.id] = str(node.value.value)
            elif module := self._module_of(node.value):
                self.modules[target.id] = module

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function in ("require", "wrap_function_wrapper") and ast.unparse(node.args[0]) not in NOT_OF_LLAVA:
            self.fetched.add(ast.literal_eval(node.args[1]))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if module := self._module_of(node.value):
            name = f"{module}.{node.attr}"
            if not module_file(self.llava, name):
                self.names.add(name)

    def _is_module(self, value: object) -> bool:
        named = isinstance(value, str) and re.fullmatch(r"llava(\.\w+)+", value)
        return bool(named) and module_file(self.llava, str(value)) is not None

    def _module_of(self, node: ast.expr) -> str | None:
        """Return the module of LLaVA that an expression stands for."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id)
        if isinstance(node, ast.Attribute):
            return ast.unparse(node) if self._is_module(ast.unparse(node)) else None
        if isinstance(node, ast.Call):  # of importlib.import_module and sys.modules.get
            for argument in node.args:
                value = argument.value if isinstance(argument, ast.Constant) else None
                if isinstance(argument, ast.Name):
                    value = self.constants.get(argument.id)
                if self._is_module(value):
                    return str(value)
        return None


def sources() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name not in LISTS:
            yield str(file.relative_to(PACKAGE)), ast.parse(file.read_text())


def uses_of(tree: ast.Module, llava: Path) -> Uses:
    uses = Uses(llava)
    uses.visit(tree)
    return uses


def words_of(tree: ast.Module) -> set[str]:
    """Return every attribute and every string of a file."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def members_used(node: ast.ClassDef) -> set[str]:
    """Return what a class defines, sets or reads on `self`, and takes from `super()`."""
    found = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) in ("self", "super()", "view"):
            found.add(inner.attr)
    return found - {"__init__"}


def find_class(name: str) -> ast.ClassDef:
    return next(
        node for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name
    )


@pytest.fixture(scope="module")
def llava(pristine_llava: Path) -> Path:
    return pristine_llava / "llava"


def test_every_seam_is_found_in_the_llava_under_test(llava: Path) -> None:
    assert missing_seams(llava) == []


def test_every_name_of_llava_that_the_package_uses_is_a_seam(llava: Path) -> None:
    unlisted, fetched = {}, {}
    for path, tree in sources():
        uses = uses_of(tree, llava)
        if uses.names - LISTED:
            unlisted[path] = uses.names - LISTED
        if uses.fetched - {seam.attribute for seam in SEAMS}:
            fetched[path] = uses.fetched
    assert unlisted == {}
    assert fetched == {}


def test_a_seam_stops_the_command_whose_code_uses_it(llava: Path) -> None:
    stops = {name: {stop for seam in SEAMS if str(seam).startswith(name) for stop in seam.stops} for name in LISTED}
    wrong = [
        f"{path} uses {name}"
        for path, tree in sources()
        if (command := COMMAND_OF.get(path.split("/")[0]))
        for name in uses_of(tree, llava).names
        if command not in stops[name]
    ]
    assert wrong == []
    assert {command for seam in SEAMS for command in seam.stops} == set(COMMANDS)


def test_the_guard_sees_every_way_in_which_a_name_can_be_used(llava: Path) -> None:
    source = """
import llava.constants
from llava.serve import cli as program
from llava.mm_utils import divide_to_patches as divide
PAGE = "llava.serve.controller"
def later(module):
    llava.constants.LOGDIR = "elsewhere"
    program.load_image("a.png")
    page = importlib.import_module(PAGE)
    page.heart_beat_controller()
    sys.modules.get("llava.utils").violates_moderation("")
    require(module, "unpad_image")
    wrap_function_wrapper(module, "select_best_resolution", later)
"""
    uses = uses_of(ast.parse(source), llava)
    assert uses.names == {
        "llava.constants.LOGDIR",
        "llava.serve.cli.load_image",
        "llava.mm_utils.divide_to_patches",
        "llava.serve.controller.heart_beat_controller",
        "llava.utils.violates_moderation",
    }
    assert uses.fetched == {"unpad_image", "select_best_resolution"}


def test_every_method_of_llavas_model_that_the_package_uses_is_a_seam(llava: Path) -> None:
    words = set().union(*(words_of(tree) for _, tree in sources()))
    modules = ("llava.model.llava_arch", "llava.model.language_model.llava_llama")
    defined = {
        name: name.rpartition(".")[2]
        for module in modules
        if (file := module_file(llava, module))
        for name in defined_names(file)
        if re.match(r"(LlavaMeta|LlavaLlama)\w+\.", name)
    }
    used = {member for member in defined.values() if member in words} - COMMON
    listed = {seam.attribute.rpartition(".")[2] for seam in SEAMS if seam.module in modules}
    optional = {"image_newline"}  # only a model for pictures in tiles has one
    assert used - listed == optional
    assert "prepare_inputs_labels_for_multimodal" in used


def test_what_is_overridden_in_the_trainer_is_a_seam() -> None:
    transformers = package_folder("transformers")
    assert transformers is not None
    source = module_file(transformers, "transformers.trainer")
    assert source is not None
    of_trainer = {name for name in defined_names(source) if name.startswith("Trainer.")}
    mixins = map(find_class, ("SteeringTrainerMixin", "LlavaTrainerMixin", "ValidationMixin", "ResumePositionMixin"))
    used = {f"Trainer.{name}" for mixin in mixins for name in members_used(mixin)} & of_trainer
    assert used == {seam.attribute for seam in SEAMS if seam.module == "transformers.trainer"}
    assert "Trainer._save_checkpoint" in used


def test_what_is_overridden_in_the_model_worker_is_a_seam(llava: Path) -> None:
    source = module_file(llava, "llava.serve.model_worker")
    assert source is not None
    used = {f"ModelWorker.{name}" for name in members_used(find_class("AdapterWorker"))} & defined_names(source)
    assert used <= {seam.attribute for seam in SEAMS if seam.module == "llava.serve.model_worker"}
    assert "ModelWorker.get_status" in used


def test_a_program_of_llava_that_the_package_starts_is_a_seam(llava: Path) -> None:
    programs = {
        word
        for path, tree in sources()
        if path.startswith("serving/")
        for word in words_of(tree)
        if re.fullmatch(r"llava\.serve\.\w+", word)
    }
    assert programs
    assert {f"{program}.__main__" for program in programs} <= LISTED


def test_no_seam_is_listed_that_nothing_uses() -> None:
    text = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py") if file.name not in LISTS)
    unused = [
        str(seam)
        for seam in SEAMS
        if seam.attribute != "__main__" and not re.search(rf"\b{seam.attribute.rpartition('.')[2]}\b", text)
    ]
    assert unused == []


def test_names_are_found_wherever_a_file_can_define_them(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from elsewhere import given as taken\n"
        "if fast:\n    speed = 1\nelse:\n    def slow(): ...\n"
        "try:\n    import there\nexcept ImportError:\n    there = None\n"
        "class Model:\n"
        "    size: int = 3\n"
        "    def run(self):\n        self.left, self.right = 1, 2\n"
        'if "__main__" == __name__:\n    args = 1\n'
    )
    assert defined_names(file) == {
        *("taken", "speed", "slow", "there", "args", "__main__"),
        *("Model", "Model.size", "Model.run", "Model.left", "Model.right"),
    }


def test_require_names_the_missing_seam_and_where_it_was_searched(tmp_path: Path) -> None:
    module = ModuleType("llava.mm_utils")
    module.__file__ = str(tmp_path / "mm_utils.py")
    module.present = "here"  # type: ignore[attr-defined]
    assert require(module, "present") == "here"
    assert require(module, "present.upper")() == "HERE"
    with pytest.raises(UpstreamError) as caught:
        require(module, "get_model_name_from_path")
    assert "llava.mm_utils.get_model_name_from_path" in str(caught.value)
    assert module.__file__ in str(caught.value) and "doctor" in str(caught.value)


def test_a_seam_is_shown_with_its_module() -> None:
    assert (
        str(Seam("llava.mm_utils", "process_images", "prepares images", ("chat",))) == "llava.mm_utils.process_images"
    )
