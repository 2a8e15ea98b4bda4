"""Checks what the command line of a diagnosis and its files tell, before a model is loaded. All that is wrong is said.

Importing it imports neither matplotlib nor scipy, which may be missing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from llava_steering_plugin.adapters.locate import find, locate
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.inference.base_files import check_adapters_fit, check_base
from llava_steering_plugin.inference.base_model import read_base_config
from llava_steering_plugin.inference.models import PEFT_CONFIG, base_of_lora, moved
from llava_steering_plugin.inference.options import check_bits, choose_device
from llava_steering_plugin.upstream.conversations import checked_template
from llava_steering_plugin.upstream.install import install

PACKAGES = ("matplotlib", "scipy")


def check_flags(
    output: Path, *, device: str, load_4bit: bool, load_8bit: bool, conversation: str | None, problems: Problems
) -> str:
    """Check what both diagnoses are told in the same way; return the device.

    Args:
        problems: gets the errors.

    Raises:
        ArgumentsError: a package is missing without which nothing can be measured.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ArgumentsError(
            f"diagnoses need {' and '.join(missing)}: pip install 'llava-steering-plugin[diagnostics]'"
        )
    chosen = device
    with problems.noted():
        chosen = choose_device(device)
    with problems.noted():
        check_bits(load_4bit, load_8bit)
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
            _check_model(name, path, base, bases)


def _check_model(name: str, path: str, base: str | None, bases: bool) -> None:
    own = find(path)
    peft = Path(path).expanduser() / PEFT_CONFIG
    if own is not None:
        where = base or own.config.base.name_or_path
        check_adapters_fit({name: own}, where, read_base_config(where, "" if base else moved(own)))
    elif peft.is_file():
        read_base_config(base or base_of_lora(peft))
    elif bases:
        check_base(path)
    elif os.path.isdir(os.path.expanduser(path)):
        raise ArgumentsError(f"{path} is neither an adapter nor an unmerged LoRA, so there is nothing to measure.")
    else:
        locate(path)


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
