"""Imports that LLaVA's dependencies make and hardly any program needs: they cost more than half of a start.

- bitsandbytes decorates its fallback operators with `torch.compile` when it is imported, and accelerate imports
  bitsandbytes in every program of LLaVA. The decoration alone loads torch's compiler, Dynamo and Inductor. After
  `defer_compilation()` these operators are compiled when they are first called; what they compute is the same.
- transformers imports scikit-learn, and with it SciPy, for its GLUE metrics.

Only functions that are defined in bitsandbytes are deferred, and only while it is being imported. This is for the entry
of a program that is ours: a patched LLaVA that runs without us is left alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "bitsandbytes"

AnyFunction = Callable[..., Any]


def defer_compilation() -> None:
    """Have the first import of bitsandbytes in this process defer its calls of `torch.compile`.

    It imports neither of them. A second call has no effect, nor has one after the import.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds bitsandbytes as Python does, and gives it a loader that defers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        # Anything but a plain package of source files is left to whoever finds it next, and to its own pace.
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with compiled_on_first_call(PACKAGE):
            super().exec_module(module)


@contextmanager
def compiled_on_first_call(package: str) -> Iterator[None]:
    """Make `torch.compile`, inside the block, give functions of `package` back uncompiled until they are called.

    Everything else is compiled at once, also what other threads compile meanwhile.
    """
    import torch

    original = torch.compile

    @functools.wraps(original)
    def deferring(model: Any = None, **options: Any) -> Any:
        if model is None:  # a decorator with options
            return functools.partial(deferring, **options)
        if isinstance(model, FunctionType) and f"{model.__module__}.".startswith(f"{package}."):
            return _deferred(model, functools.partial(original, model, **options))
        return original(model, **options)

    torch.compile = deferring
    try:
        yield
    finally:
        if torch.compile is deferring:  # else somebody has replaced it since, and puts it back
            torch.compile = original


def _deferred(function: AnyFunction, make: Callable[[], AnyFunction]) -> AnyFunction:
    """Return a function that calls what `make` makes of `function`, and makes it when it is first called."""
    made = functools.cache(make)  # two threads may both make one; either does

    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        return made()(*args, **kwargs)

    return compiled


@contextmanager
def without_glue_metrics() -> Iterator[None]:
    """Inside the block, hide scikit-learn from imports, if neither it nor transformers has been imported.

    A transformers that is imported there does without its GLUE metrics, for good. One that has been imported has found
    scikit-learn already and counts on it.
    """
    if {"sklearn", "transformers"} & sys.modules.keys():
        yield
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules["sklearn"]
