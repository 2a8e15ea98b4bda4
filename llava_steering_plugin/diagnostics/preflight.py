"""Checks what the command line of a diagnosis and its files tell, before a model is loaded. All that is wrong is said.

Importing it imports neither matplotlib nor scipy, which may be missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from llava_steering_plugin.adapters.fit.fingerprint import alike
from llava_steering_plugin.adapters.stored.folder import FINGERPRINT, PEFT_CONFIG, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.inference.base_files import CONFIG
from llava_steering_plugin.inference.models import check_model
from llava_steering_plugin.inference.options import check_bits, choose_device
from llava_steering_plugin.modes.joint import part_names
from llava_steering_plugin.upstream.install import install
from llava_steering_plugin.upstream.text.conversations import checked_template

PACKAGES = ("matplotlib", "scipy")
# How pip calls a package that is imported under another name.
INSTALLED_AS = {"sklearn": "scikit-learn"}
# The command that looks into the adapters of a mode.
FITTING = {"mores": "diagnose steering", "mixlora": "diagnose routing"}


def check_flags(
    output: Path,
    *,
    device: str,
    load_4bit: bool,
    load_8bit: bool,
    conversation: str | None,
    problems: Problems,
    packages: Sequence[str] = PACKAGES,
) -> str:
    """Check what all diagnoses are told in the same way, and that `packages` are there; return the device.

    Args:
        problems: gets the errors.
    """
    with problems.noted():
        _check_packages(packages)
    chosen = device
    with problems.noted():
        chosen = choose_device(device)
    with problems.noted():
        check_bits(load_4bit, load_8bit, device)
    with problems.noted():
        find_llava()  # its error says what to do if there is none
        install()
        if conversation is not None:
            checked_template(conversation)
    with problems.noted():
        _check_writable(output)
    return chosen


def check_models(models: Mapping[str, str], base: str | None, problems: Problems, *, bases: bool) -> None:
    """Check that all models are there, and that adapters have the size of their bases.

    Args:
        models: the path of each, by name.
        base: where the base of adapters and LoRAs is, if not where their configs say.
        problems: gets the errors.
        bases: whether a model may be a base of its own.
    """
    for name, path in models.items():
        with problems.noted():
            check_model(path, base, bases=bases, name=name)


def check_mode(models: Mapping[str, str], base: str | None, problems: Problems, mode: str) -> None:
    """Check that all models are adapters of one mode, or joint ones with it as a part, of the size of their bases.

    Args:
        models: the path of each, by name.
        base: as in `check_models`.
        problems: gets the errors, with the command that fits what is there instead.
    """
    for name, path in models.items():
        with problems.noted():
            own = find(path)
            if own is not None and mode not in (parts := part_names(own.config.mode)):
                other = next((FITTING[part] for part in parts if part in FITTING), "diagnose modality")
                raise ArgumentsError(
                    f"{path} is a {own.config.mode} adapter, and `{FITTING[mode]}` is for {mode}: use "
                    f"`llava-steering {other}`."
                )
            if own is None and (kind := _other_kind(path)) is not None:
                raise ArgumentsError(f"{path} is {kind}, and `{FITTING[mode]}` is for adapters of the mode {mode}.")
        with problems.noted():
            if find(path) is not None or _other_kind(path) is None:
                check_model(path, base, bases=False, name=name)


def shared_template(models: Mapping[str, str]) -> str | None:
    """Return the conversation template of the adapters among some models, if all of them have the same one.

    Models that are compared have to read the same prompts. A base has no template of its own.

    Args:
        models: the path of each, by name.
    """
    own = {found.config.conversation for path in models.values() if (found := find(path)) is not None}
    return own.pop() if len(own) == 1 else None


def check_same_base(models: Mapping[str, str], problems: Problems) -> None:
    """Check that adapters whose weights are compared have one base, by the rows of it that they keep.

    Args:
        models: the path of each, by name; those that are no adapters are passed over.
        problems: gets the error.
    """
    first: tuple[str, StoredAdapter] | None = None
    for name, path in models.items():
        with problems.noted():
            found = find(path)
            if found is None:
                continue
            stored = found.read()
            if first is None:
                first = name, stored
            elif not _one_base(first[1], stored):
                raise ArgumentsError(
                    f"{first[0]} and {name} have different bases ({first[1].config.base}; {stored.config.base}), so "
                    "what they steer cannot be compared. Measure them one by one, each with its own --output."
                )


def _one_base(one: StoredAdapter, other: StoredAdapter) -> bool:
    sizes = [(each.config.base.num_layers, each.config.base.hidden_size) for each in (one, other)]
    here, there = (each.tensors.get(FINGERPRINT + "rows") for each in (one, other))
    return sizes[0] == sizes[1] and (here is None or there is None or alike(here, there))


def _other_kind(path: str) -> str | None:
    """Return what is at a path that holds no adapter of ours, with the command that fits it; None: nothing known."""
    folder = Path(path).expanduser()
    if (folder / PEFT_CONFIG).is_file():
        return "a LoRA (use `llava-steering diagnose interference` or `diagnose modality`)"
    if (folder / CONFIG).is_file():
        return "a base (use `llava-steering diagnose modality`)"
    return None


def _check_packages(packages: Sequence[str]) -> None:
    """Check that packages can be imported, without importing them.

    Raises:
        ArgumentsError: some cannot.
    """
    missing = [INSTALLED_AS.get(name, name) for name in packages if find_spec(name) is None]
    if missing:
        raise ArgumentsError(
            f"diagnoses need {' and '.join(missing)}: pip install -e '.[diagnostics]' in this plugin's folder"
        )


def _check_writable(output: Path) -> None:
    """Create the folder of the results, and check that files can be made in it.

    Raises:
        ArgumentsError: they cannot.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ArgumentsError(f"--output {output} cannot be written: {error.strerror}. Choose another.") from error
