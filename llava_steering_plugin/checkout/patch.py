"""Write the block that loads plugins into llava/__init__.py, and remove it again byte for byte.

The block calls every entry point of the group `llava.plugins`. A plugin that fails stops `import llava`, on purpose:
otherwise the program would not do what the user asked for, and nobody would notice. If no plugin is installed, the
block does nothing, so that LLaVA still works after this package is uninstalled.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from llava_steering_plugin.checkout.find import Llava
from llava_steering_plugin.errors import UpstreamError, listing

GROUP = "llava.plugins"
ENTRY_POINT = "llava_steering_plugin.upstream.install:install"
DISTRIBUTION = "llava-steering-plugin"
BEGIN = "# >>> llava plugins >>>"
END = "# <<< llava plugins <<<"
# It begins with a line end: a blank line after a file that ends in one, and the missing line end of a file that does
# not. Removing exactly these bytes restores both.
BLOCK = f"""
{BEGIN} written by `llava-steering patch`; `llava-steering unpatch` removes it
# Calls what installed packages offer as entry points "{GROUP}". A plugin that fails stops here, on purpose:
# llava without it would be another program than the one that was asked for.
from importlib.metadata import entry_points as _entry_points

for _plugin in _entry_points(group="{GROUP}"):
    try:
        _plugin.load()()
    except Exception as _error:
        raise ImportError(
            f"llava plugin {{_plugin.name!r}} ({{_plugin.value}}) failed: {{_error}}. Mend it, uninstall it, or run "
            "`llava-steering unpatch`."
        ) from _error
{END}
"""


class State(enum.Enum):
    """Says what a llava/__init__.py holds."""

    CLEAN = "not patched"
    PATCHED = "patched"
    EDITED = "patched, then edited by hand"


def state(llava: Llava) -> State:
    """Return whether this llava has the block, and whether it was edited."""
    content = llava.init.read_bytes()
    rest = _without_block(content)
    if any(marker.encode() in (content if rest is None else rest) for marker in (BEGIN, END)):
        return State.EDITED
    return State.CLEAN if rest is None else State.PATCHED


def patch(llava: Llava) -> bool:
    """Append the block to llava/__init__.py; return False if it is there already.

    Raises:
        UpstreamError: the block was edited, the file cannot be written, or the block would have no effect because this
            Python does not see the plugin's entry point.
    """
    problem = entry_point_problem()
    if problem is not None:
        raise UpstreamError(f"patching would have no effect: {problem}")
    found = state(llava)
    if found is State.EDITED:
        raise _edited(llava)
    if found is State.PATCHED:
        return False
    content = llava.init.read_bytes()
    _replace(llava, content + _block(_newline_of(content)))
    return True


def unpatch(llava: Llava) -> bool:
    """Remove the block, leaving every other byte unchanged; return False if there is none.

    Raises:
        UpstreamError: the block was edited, or the file cannot be written.
    """
    if state(llava) is State.EDITED:
        raise _edited(llava)
    rest = _without_block(llava.init.read_bytes())
    if rest is None:
        return False
    _replace(llava, rest)
    return True


def entry_point_problem() -> str | None:
    """Return why llava would not find the plugin in this Python; None if it would."""
    visible = [point.value for point in importlib.metadata.entry_points(group=GROUP)]
    if ENTRY_POINT in visible:
        return None
    # importlib.metadata takes the first distribution of a name on the path, so an old one hides a newer one.
    seen = [
        f"{DISTRIBUTION} {distribution.version} in {distribution.locate_file('')}"
        for distribution in importlib.metadata.distributions(name=DISTRIBUTION)
    ]
    if not seen:
        return (
            f"no distribution {DISTRIBUTION} is installed, so llava cannot find its entry point. Install it into this "
            "Python (`pip install llava-steering-plugin`); having its folder on the path is not enough."
        )
    return listing(
        f"the entry point {GROUP}: {ENTRY_POINT} is not visible, because the first of these is stale and hides it. "
        f"Remove them (`pip uninstall {DISTRIBUTION}`, repeated, or delete a left-over .egg-info or .dist-info) "
        "and install again",
        seen,
    )


def _edited(llava: Llava) -> UpstreamError:
    return UpstreamError(
        f"{llava.init} holds a plugin block that differs from the one `llava-steering patch` writes: it was edited, or "
        f'written by another version. Remove the lines from "{BEGIN}" to "{END}" in an editor (or restore the file '
        "with `git checkout`), then patch again."
    )


def _newline_of(content: bytes) -> bytes:
    """Return the line end of the last complete line; that of Unix if there is none."""
    last = content.rfind(b"\n")
    return b"\r\n" if content[:last].endswith(b"\r") else b"\n"


def _block(newline: bytes) -> bytes:
    return BLOCK.encode().replace(b"\n", newline)


def _without_block(content: bytes) -> bytes | None:
    """Return the content as it was before the block was written; None if it holds no unchanged block."""
    for newline in (b"\n", b"\r\n"):
        before, block, after = content.partition(_block(newline))
        if block:
            # Lines added below the block must not be joined to a last line that had no line end.
            glue = newline if after and before and not before.endswith(b"\n") else b""
            return before + glue + after
    return None


def _replace(llava: Llava, content: bytes) -> None:
    """Replace llava/__init__.py by one rename, so that no process ever imports a part of it."""
    target = llava.init.resolve()  # the file itself, if this is a link
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, scratch)
        os.replace(scratch, target)
    except OSError as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise UpstreamError(
            f"cannot write {target}: {error.strerror}. Nothing was changed. Without write permission, start LLaVA's "
            "programs through the launcher, which edits nothing: "
            "python -m llava_steering_plugin.launch llava.train.train_mem ..."
        ) from error
