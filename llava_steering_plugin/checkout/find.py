"""Find LLaVA on this machine without importing it: an import takes seconds, and may fail for other reasons."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from llava_steering_plugin.errors import UpstreamError, listing

_LANDMARK = Path("model") / "builder.py"  # every LLaVA has it; other packages named llava do not


@dataclass(frozen=True)
class Llava:
    """One LLaVA: the folder of the package, and how it was found."""

    package: Path
    found_by: str

    @property
    def init(self) -> Path:
        return self.package / "__init__.py"


def find_llava(path: Path | None = None) -> Llava:
    """Return the llava at `path` (a checkout, or its llava folder); without a path, the one that `import llava` finds.

    Raises:
        UpstreamError: there is none, or what is there is not LLaVA.
    """
    if path is not None:
        return _llava_at(path)
    package = _importable()
    if package is None:
        here = Path.cwd()
        nearby = _is_llava(here / "llava")
        hint = f"There is one in {here}: use `--llava .`" if nearby else "Use `--llava PATH_OF_CHECKOUT`"
        raise UpstreamError(
            f"`import llava` finds nothing in this Python ({sys.executable}). {hint}, or install LLaVA here with "
            "`pip install -e .` in its checkout."
        )
    if not _is_llava(package):
        raise UpstreamError(
            f"the package llava in {package} is not LLaVA: it has no {_LANDMARK}. Use `--llava PATH_OF_CHECKOUT`."
        )
    return Llava(package, "what `import llava` finds")


def other_llavas(used: Llava) -> list[Llava]:
    """Return other LLaVAs, which a program could import instead of this one."""
    places = [
        (_importable(), "what `import llava` finds"),
        (Path.cwd() / "llava", "in the current folder, which `python -m` prefers"),
        *((Path(entry or os.curdir) / "llava", "further down Python's path, hidden") for entry in sys.path),
    ]
    found: dict[Path, Llava] = {}
    for package, found_by in places:
        if package is not None and _is_llava(package):
            found.setdefault(package.resolve(), Llava(package.resolve(), found_by))
    return [llava for package, llava in found.items() if package != used.package]


def distribution_of(llava: Llava) -> importlib.metadata.Distribution | None:
    """Return the installed distribution that this llava belongs to; None for a plain checkout on the path."""
    for name in dict.fromkeys(importlib.metadata.packages_distributions().get("llava", [])):
        distribution = importlib.metadata.distribution(name)
        if _root_of(distribution) == llava.package.parent:
            return distribution
    return None


def git_commit(llava: Llava) -> str | None:
    """Return the commit that is checked out where this llava lies; None if git does not track it, or is missing.

    A llava in a virtual environment inside another repository is not tracked by it.
    """
    try:
        _git(llava, "ls-files", "--error-unmatch", "__init__.py")
        return _git(llava, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(llava: Llava, *words: str) -> str:
    command = ["git", "-C", str(llava.package), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _llava_at(path: Path) -> Llava:
    tried = [path / "llava", path]
    for package in tried:
        if _is_llava(package):
            return Llava(package.resolve(), f"--llava {path}")
    raise UpstreamError(
        listing(
            f"no LLaVA in {path}; give a checkout or its llava folder. Looked for",
            [str(package / _LANDMARK) for package in tried],
        )
    )


def _is_llava(package: Path) -> bool:
    return (package / "__init__.py").is_file() and (package / _LANDMARK).is_file()


def _importable() -> Path | None:
    try:
        spec = importlib.util.find_spec("llava")
    except ValueError:  # a llava that was put into sys.modules by hand
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).resolve() if places else None


def _root_of(distribution: importlib.metadata.Distribution) -> Path:
    """Return the folder from which the distribution's packages are imported; for an editable install, the checkout."""
    text = distribution.read_text("direct_url.json")
    if text is not None:
        origin = json.loads(text)
        if origin.get("dir_info", {}).get("editable"):
            return Path(unquote(urlparse(origin["url"]).path)).resolve()
    return Path(str(distribution.locate_file(""))).resolve()
