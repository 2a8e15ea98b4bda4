"""Keep measurements in a file as they are made, so that an interrupted run goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.diagnostics.results import weights_of
from llava_steering_plugin.errors import ArgumentsError, Problems, listing
from llava_steering_plugin.whole_files import write_whole

KEY = "question_id"
# Settings that are the digests of files: users know the files, and not these.
DIGESTS = ("questions", "answers", "data", "weights")


def open_records(
    folder: Path, settings: Mapping[str, Any], models: Mapping[str, str], base: str | None
) -> dict[str, Records]:
    """Open the measurements of several models, made before or not, by the models' names.

    Args:
        folder: holds a file for each model.
        settings: what measurements depend on besides the model.
        models: the path of each model, by name.
        base: where the base of adapters is, if it has moved.

    Raises:
        ArgumentsError: as `Records` does; all models at once.
    """
    kept, problems = {}, Problems()
    for name, path in models.items():
        own = {**settings, "model": path, "weights": weights_of(path), "base": base}
        with problems.noted():
            kept[name] = Records(folder / f"{name}.jsonl", own)
    problems.raise_any("these measurements cannot be continued")
    return kept


# The file of what is known of the model ends so, beside that of its measurements.
ABOUT = ".json"


class Records:
    """Holds the measurements of one model, one JSON object a line after a line with the settings.

    The file alone holds the measurements: in memory are their keys, so that thousands fit.

    Args:
        settings: what the measurements depend on. Measurements of other settings are not mixed with these.

    Raises:
        ArgumentsError: the file holds measurements of other settings, is none of ours, or cannot be written.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self.file, self.settings = file, dict(settings)
        self._keys: set[str] = set()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._read()
            if not file.exists():
                self._append(self.settings)
        except OSError as error:
            raise ArgumentsError(f"{file} cannot be written: {error.strerror}. Choose another --output.") from error

    @property
    def mark(self) -> str:
        """Return a digest of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def about(self) -> dict[str, Any] | None:
        """Return what `note` has kept of the model; None if nothing was, or of other settings."""
        try:
            kept = json.loads(self.file.with_suffix(ABOUT).read_text(encoding="utf-8"))
            return dict(kept["about"]) if kept["settings"] == self.mark else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what is known of the model, beside its measurements, and return it.

        Raises:
            ArgumentsError: it cannot be written.
        """
        file = self.file.with_suffix(ABOUT)
        try:
            write_whole(file, json.dumps({"settings": self.mark, "about": about}) + "\n")
        except OSError as error:
            raise ArgumentsError(f"{file} cannot be written: {error.strerror}. Choose another --output.") from error
        return dict(about)

    def __contains__(self, key: object) -> bool:
        return json.dumps(key) in self._keys

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.file.open(encoding="utf-8") as file:
            next(file)  # the settings
            for line in file:
                yield json.loads(line)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a measurement."""
        self._append(row)
        self._keys.add(json.dumps(row[KEY]))

    def _append(self, row: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        """Take over what an interrupted run has measured; drop the line that it was writing."""
        found, end = None, 0
        try:
            with self.file.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    row = json.loads(line)
                    if not isinstance(row, dict) or (found is not None and KEY not in row):
                        raise ValueError("a line is no measurement")
                    if found is None:
                        found = row
                    else:
                        self._keys.add(json.dumps(row[KEY]))
        except ValueError as error:
            raise ArgumentsError(
                f"{self.file} holds no measurements ({error}). Remove it, or choose another --output."
            ) from error
        if found is None:
            self.file.unlink()
            return
        if found != self.settings:
            changed = sorted(
                name for name in found.keys() | self.settings.keys() if found.get(name) != self.settings.get(name)
            )
            raise ArgumentsError(
                listing(
                    f"{self.file} holds measurements of other settings; remove it, or choose another --output",
                    [_change(name, found.get(name), self.settings.get(name)) for name in changed],
                )
            )
        if end < self.file.stat().st_size:
            with self.file.open("r+b") as file:
                file.truncate(end)


def _change(name: str, there: Any, now: Any) -> str:
    if name in DIGESTS and there is not None and now is not None:
        return f"{name}: the files have other contents now"
    return f"{name}: {there!r} there, {now!r} now"
