"""The names of upstream that the plugin stands on, and where LLaVA's forks differ.

Upstream main, its 1.2.2.post1 wheel and LLaVA-NeXT share every name in `SEAMS`. `doctor` looks them up in the source,
without importing llava; the import hooks fetch them with `require`, so that a missing one is named instead of surfacing
later as an AttributeError somewhere else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_steering_plugin.errors import UpstreamError


@dataclass(frozen=True)
class Seam:
    """One name of upstream that the plugin replaces, wraps or calls."""

    module: str
    attribute: str  # dotted from the module on, for example "LlavaMetaForCausalLM.generate"
    purpose: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


SEAMS = (
    Seam("llava.train.train", "train", "the training that the plugin extends"),
    Seam("llava.train.train", "TrainingArguments", "gets the flags of the tuning modes"),
    Seam("llava.train.train", "LLaVATrainer", "attaches the adapter, saves and resumes it"),
    Seam("llava.train.train", "safe_save_model_for_hf_trainer", "writes the adapter instead of the whole model"),
    Seam("llava.model.builder", "load_pretrained_model", "loads an adapter's base, then the adapter"),
    Seam("llava.mm_utils", "get_model_name_from_path", "gives an adapter a name that upstream's rules understand"),
    Seam(
        "llava.model.llava_arch",
        "LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal",
        "tells which tokens are visual",
    ),
    Seam("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM.forward", "opens the token map"),
    Seam("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM.generate", "opens the token map"),
)


def require(module: ModuleType, attribute: str) -> Any:
    """The attribute (dotted) of an imported module of upstream.

    Raises:
        UpstreamError: it is not there; the message names the seam and the file that was searched.
    """
    value: Any = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            where = getattr(module, "__file__", None) or "an unknown place"
            raise UpstreamError(
                f"this LLaVA has no {module.__name__}.{attribute}, which the plugin needs (searched {where}). "
                "It is probably a fork or a version that the plugin does not know: `llava-steering doctor` lists "
                "every name it looks for."
            )
        value = getattr(value, name)
    return value


def missing_seams(package: Path) -> list[Seam]:
    """The seams that the source of the llava in the folder `package` lacks; nothing is imported."""
    names: dict[str, set[str]] = {}
    for module in {seam.module for seam in SEAMS}:
        source = module_file(package, module)
        names[module] = set(_names(_parse(source).body)) if source is not None else set()
    return [seam for seam in SEAMS if seam.attribute not in names[seam.module]]


def module_file(package: Path, module: str) -> Path | None:
    """The file of the dotted `module` of the llava in the folder `package`, or None when there is no such module."""
    stem = package.joinpath(*module.split(".")[1:])
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def _parse(source: Path) -> ast.Module:
    try:
        return ast.parse(source.read_bytes(), filename=str(source))
    except SyntaxError as error:
        raise UpstreamError(f"{source} is not valid Python for this interpreter: {error}") from error


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements bind, with those of classes dotted, also inside `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{name}" for name in _names(node.body))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.If):
            yield from _names(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _names(node.body + node.orelse + node.finalbody)
            for handler in node.handlers:
                yield from _names(handler.body)
