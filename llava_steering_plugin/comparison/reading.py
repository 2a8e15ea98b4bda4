"""Read the file of a comparison: YAML, with every key checked, and all that is wrong in one message."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava_steering_plugin.comparison.schema import (
    FILES,
    FROZEN,
    LONGEST_NAME,
    NEEDED,
    OF_A_TASK,
    OF_A_TEST,
    OF_ANSWERS,
    OWN_FLAGS,
    PATHS,
    PROGRAM,
    RATES,
    TOP,
    Comparison,
    Method,
    Task,
    Test,
)
from llava_steering_plugin.errors import ArgumentsError, listing, nearest


def read_comparison(file: Path) -> Comparison:
    """Read the file of a comparison.

    Raises:
        ArgumentsError: it cannot be read, or is none; everything that is wrong is named.
    """
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ArgumentsError(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArgumentsError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return comparison_from(data, file.resolve().parent)
    except ArgumentsError as error:
        raise ArgumentsError(f"{file}: {error}") from None


def comparison_from(data: Any, folder: Path) -> Comparison:
    """Make a comparison from the content of its file.

    Args:
        folder: where relative paths begin.

    Raises:
        ArgumentsError: something in it is wrong; everything that is, is named.
    """
    if not isinstance(data, Mapping):
        what = "is empty" if data is None else f"holds {data!r:.60}"
        raise ArgumentsError(f"it {what}, where a comparison has {', '.join(NEEDED)}: see docs/comparing.md.")
    reading = _Reading(folder)
    found = reading.comparison(data)
    if reading.problems:
        raise ArgumentsError(listing("this comparison cannot be made", list(dict.fromkeys(reading.problems))))
    return found


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML's own loader keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise ValueError(f"{key!r} in line {line} is given twice")
        return dict(super().construct_mapping(node, deep))


class _Reading:
    """Reads the content of a file, and collects what is wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []

    def comparison(self, data: Any) -> Comparison:
        data = self._table(data, "", TOP, NEEDED)
        base = self._text(data, "base")
        rates = self._numbers(data[RATES], RATES) if RATES in data else ()
        defaults = self._flags(data.get("defaults") or {}, "defaults")
        methods = [
            self._method(name, flags, defaults, rates)
            for name, flags in self._named(data.get("methods", {}), "methods")
        ]
        frozen = [method.name for method in methods if method.frozen]
        if methods and len(frozen) == len(methods):
            self.problems.append("methods: none is trained; give one that is not frozen")
        elif len(frozen) > 1:
            self.problems.append(f"methods: {', '.join(frozen)} are all the base itself; keep one")
        budgets = {method.name: len(method.rates) for method in methods if not method.frozen}
        if len(set(budgets.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in budgets.items())
            self.problems.append(f"{RATES}: every method tries as many, or the comparison is not fair; here {shown}")
        tasks = tuple(self._task(name, task) for name, task in self._named(data.get("tasks", {}), "tasks"))
        reference = self._text(data, "reference") or None
        names = [method.name for method in methods]
        if reference is not None and reference not in names:
            self.problems.append(f"reference is {reference!r}; {nearest(reference, names)}it names a method")
        return Comparison(
            base=str(self._path(base)) if base and (self.folder / base).expanduser().exists() else base,
            output=self._path(self._text(data, "output") or "."),
            methods=tuple(methods),
            seeds=self._seeds(data.get("seeds", [])) if "seeds" in data else (),
            tasks=tasks,
            processes=self._count(data.get("processes", 1), "processes"),
            gpus=self._gpus(data.get("gpus") or []),
            answers=self._answers(data.get("answers") or {}),
            program=self._text(data, "program") or PROGRAM,
            launcher=self._words(data.get("launcher") or []),
            reference=reference,
            folder=self.folder,
        )

    def _method(self, name: str, given: Any, defaults: Mapping[str, Any], rates: tuple[float, ...]) -> Method:
        place = f"methods.{name}"
        given = dict(given) if isinstance(given, Mapping) else given
        frozen, own = (given.pop(key, None) for key in (FROZEN, RATES)) if isinstance(given, dict) else (None, None)
        if frozen not in (None, True, False):
            self.problems.append(f"{place}.{FROZEN} is {frozen!r}; it is true or false")
        flags = self._flags(given, place)
        if frozen is True and (flags or own is not None):
            self.problems.append(f"{place}: the base itself is not trained, so it takes no flags; remove them")
        if own is not None:
            rates = self._numbers(own, f"{place}.{RATES}")
        merged = {flag: value for flag, value in {**defaults, **flags}.items() if value is not None}
        return Method(name, {} if frozen is True else merged, frozen is True, () if frozen is True else rates)

    def _task(self, name: str, given: Any) -> Task:
        place = f"tasks.{name}"
        given = self._table(given, place, OF_A_TASK, OF_A_TASK)
        images = self._there(given, "image_folder", place, Path.is_dir, "folder")
        tests = {
            split: tuple(
                self._test(test, each, f"{place}.{split}", images)
                for test, each in self._named(given.get(split) or {}, f"{place}.{split}")
            )
            for split in ("validation", "test")
            if split in given
        }
        validation, test = tests.get("validation", ()), tests.get("test", ())
        return Task(name, self._there(given, "train", place, Path.is_file, "file"), images, validation, test)

    def _test(self, name: str, given: Any, place: str, images: Path) -> Test:
        place = f"{place}.{name}"
        given = self._table(given, place, OF_A_TEST, ("questions", "annotations", "benchmark"))
        if "image_folder" in given:
            images = self._there(given, "image_folder", place, Path.is_dir, "folder")
        return Test(
            name,
            self._there(given, "questions", place, Path.is_file, "file"),
            self._there(given, "annotations", place, Path.exists, "file or folder"),
            self._text(given, "benchmark", place),
            images,
            self._text(given, "split", place) or None,
            self._text(given, "metric", place) or None,
        )

    def _flags(self, given: Any, place: str) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            self.problems.append(f"{place} is {given!r:.60}; it holds flags of the training, without dashes")
            return {}
        flags = {}
        for flag, value in given.items():
            if not isinstance(flag, str) or not flag.replace("_", "").isalnum():
                self.problems.append(f"{place}.{flag}: a flag is given without dashes, such as mores_rank: 1")
            elif flag in OWN_FLAGS:
                self.problems.append(f"{place}.{flag} is set by the comparison; say it with {OWN_FLAGS[flag]}")
            elif isinstance(value, float) and not math.isfinite(value):
                self.problems.append(f"{place}.{flag} is {value}; give a number")
            else:
                flags[flag] = self._value(flag, value, place)
        return flags

    def _value(self, flag: str, value: Any, place: str) -> Any:
        if flag in PATHS and isinstance(value, str):
            if self._path(value).exists():
                return str(self._path(value))
            if flag in FILES:
                self.problems.append(f"{place}.{flag}: there is no file {self._path(value)}")
        return json.dumps(value) if isinstance(value, Mapping) else value

    def _named(self, given: Any, place: str) -> list[tuple[str, Any]]:
        if not isinstance(given, Mapping) or not given:
            self.problems.append(f"{place} holds at least one, by name{_why(place.rpartition('.')[2])}")
            return []
        for name in given:
            if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
                self.problems.append(
                    f"{place}: {name!r:.80} is no name; take a text of up to {LONGEST_NAME} characters"
                )
        return [(str(name), each) for name, each in given.items()]

    def _table(self, given: Any, place: str, known: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            self.problems.append(f"{place} is {given!r:.60}; it holds {', '.join(known)}")
            return {}
        prefix = f"{place}." if place else ""
        for key in given:
            if key not in known:
                hint = nearest(str(key), known)
                self.problems.append(f"unknown key {prefix}{key}; {hint}known: {', '.join(known)}")
        self.problems += [f"{prefix}{key} is missing{_why(key)}" for key in needed if given.get(key) is None]
        return {key: value for key, value in given.items() if value is not None}

    def _text(self, given: Mapping[str, Any], key: str, place: str = "") -> str:
        value = given.get(key, "")
        if not isinstance(value, str) or not value.isprintable():
            self.problems.append(f"{place}.{key} is {value!r:.60}; give a text".lstrip("."))
            return ""
        return value

    def _path(self, text: str) -> Path:
        return (self.folder / Path(text).expanduser()).resolve()

    def _there(self, given: Mapping[str, Any], key: str, place: str, test: Callable[[Path], bool], kind: str) -> Path:
        text = self._text(given, key, place)
        path = self._path(text)
        if text and not test(path):
            self.problems.append(f"{place}.{key}: there is no {kind} {path}")
        return path

    def _numbers(self, given: Any, place: str) -> tuple[float, ...]:
        found = []
        for value in given if isinstance(given, list) else [given]:
            try:
                number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e-3 for a text
            except (TypeError, ValueError):
                number = math.nan
            if not 0 < number < math.inf:
                self.problems.append(f"{place} holds {value!r}; learning rates are numbers above 0")
            elif number in found:
                self.problems.append(f"{place} holds {value} twice")
            found.append(number)
        if not found:
            self.problems.append(f"{place} is empty")
        return tuple(found)

    def _seeds(self, given: Any) -> tuple[int, ...]:
        seeds = given if isinstance(given, list) else [given]
        for place, seed in enumerate(seeds):
            if type(seed) is not int or not 0 <= seed < 2**32:
                self.problems.append(f"seeds holds {seed!r}; seeds are whole numbers from 0 to 2**32 - 1")
            elif seed in seeds[:place]:
                self.problems.append(f"seeds holds {seed} twice: the same training would count as two")
        if not seeds:
            self.problems.append("seeds is empty")
        return tuple(seed for seed in seeds if type(seed) is int)

    def _count(self, given: Any, place: str) -> int:
        if type(given) is not int or given < 1:
            self.problems.append(f"{place} is {given!r}; give a whole number from 1 on")
            return 1
        return given

    def _gpus(self, given: Any) -> tuple[int, ...]:
        gpus = given if isinstance(given, list) else [given]
        if any(type(gpu) is not int or gpu < 0 for gpu in gpus) or len(set(map(str, gpus))) < len(gpus):
            self.problems.append(f"gpus is {given!r}; give numbers of GPUs, each once")
            return ()
        return tuple(gpus)

    def _answers(self, given: Any) -> dict[str, Any]:
        given = self._table(given, "answers", OF_ANSWERS, ())
        for key, value in given.items():
            if isinstance(value, list | Mapping):
                self.problems.append(f"answers.{key} is {value!r:.60}; give one value")
        return dict(given)

    def _words(self, given: Any) -> tuple[str, ...]:
        words = given.split() if isinstance(given, str) else given
        if not isinstance(words, list) or any(isinstance(word, list | Mapping) for word in words):
            self.problems.append(f"launcher is {given!r:.60}; give the words of a command, such as torchrun ... -m")
            return ()
        return tuple(map(str, words))


def _why(key: str) -> str:
    if key == "validation":
        return ": learning rates are chosen by it, and the test data must not choose"
    return ""
