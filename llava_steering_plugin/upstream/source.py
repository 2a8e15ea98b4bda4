"""Read what a Python file defines, without importing it."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import symtable
from collections.abc import Iterator
from pathlib import Path

from llava_steering_plugin.errors import UpstreamError

_OF_EVERY_MODULE = {"__file__", "__name__", "__doc__", "__package__", "__path__", "__spec__"}


def module_file(package: Path, module: str) -> Path | None:
    """Return the file of the dotted `module` of a package in the folder `package`; None if there is no such module."""
    stem = package.joinpath(*module.split(".")[1:])
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def defined_names(source: Path) -> set[str]:
    """Return the names that a file defines, members of classes dotted: methods, fields and what methods set on `self`.

    Raises:
        UpstreamError: the file is not valid Python for this interpreter.
    """
    try:
        tree = ast.parse(source.read_bytes(), filename=str(source))
    except SyntaxError as error:
        raise UpstreamError(f"{source} is not valid Python for this interpreter: {error}") from error
    return set(_names(tree.body))


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that the statements bind, also inside `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{name}" for name in _names(node.body))
            yield from (f"{node.name}.{name}" for name in _set_on_self(node))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.If):
            if is_main_test(node.test):
                yield "__main__"
            yield from _names(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _names(node.body + node.orelse + node.finalbody)
            for handler in node.handlers:
                yield from _names(handler.body)


def is_main_test(test: ast.expr) -> bool:
    """Return whether an expression is `__name__ == "__main__"`, in either order."""
    return ast.unparse(test) in ("__name__ == '__main__'", "'__main__' == __name__")


def _set_on_self(node: ast.ClassDef) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            yield inner.attr


def package_folder(name: str) -> Path | None:
    """Return the folder of an importable package, without importing it."""
    spec = importlib.util.find_spec(name)
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) if places else None


def undefined_names(source: Path) -> set[str]:
    """Return the names that a file uses and nowhere gets: code that reaches them fails with a NameError.

    None are found in a file that imports everything of some module.

    Raises:
        UpstreamError: the file is not valid Python for this interpreter.
    """
    text = source.read_text(encoding="utf-8")
    try:
        whole, tree = symtable.symtable(text, str(source), "exec"), ast.parse(text)
    except SyntaxError as error:
        raise UpstreamError(f"{source} is not valid Python for this interpreter: {error}") from error
    stars = (node.names[0].name == "*" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    if any(stars):
        return set()
    scopes = list(_scopes(whole))
    given = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    given |= {
        symbol.get_name()
        for scope in scopes
        for symbol in scope.get_symbols()
        if symbol.is_declared_global() and symbol.is_assigned()
    }
    used = {
        symbol.get_name()
        for scope in scopes
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and symbol.is_global()
    }
    return used - given - set(dir(builtins)) - _OF_EVERY_MODULE


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from _scopes(inner)
