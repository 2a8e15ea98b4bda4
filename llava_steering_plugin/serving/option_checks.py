"""Checks what single options of the server say: secrets, and folders."""

from __future__ import annotations

import os
from pathlib import Path

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.options import KEY_VARIABLE, ModelOptions
from llava_steering_plugin.serving.proxies import is_loopback

TOKEN_CHARACTERS = 16


def checked_token(token: str) -> str:
    """Return the admin token if it is long enough to be a secret.

    Raises:
        ArgumentsError: it is not.
    """
    return _secret(token, "admin token", "or leave it out to turn /admin off")


def checked_key(options: ModelOptions, host: str, flag: str) -> str | None:
    """Return the key that the API asks for; None: it asks for none.

    Args:
        host: on which the API listens.
        flag: by which that was said.

    Raises:
        ArgumentsError: the key is too short, or there is none and others could use the API.
    """
    if options.api_key is not None and options.no_api_key:
        raise ArgumentsError("--api-key and --no-api-key are both given; leave one of them out.")
    if options.api_key is not None:
        return _secret(options.api_key, "API key", "or leave it out if only this machine is served")
    if not options.no_api_key and not is_loopback(host):
        raise ArgumentsError(
            f"{flag} {host} lets other machines use the API. Give a key for it, best in the variable {KEY_VARIABLE}, "
            "or say --no-api-key."
        )
    return None


def _secret(word: str, name: str, otherwise: str) -> str:
    if len(word) < TOKEN_CHARACTERS:
        raise ArgumentsError(
            f"the {name} has {len(word)} characters; it needs {TOKEN_CHARACTERS} at least. Make one with "
            f"`openssl rand -hex 16`, {otherwise}."
        )
    return word


def checked_folder(folder: Path, flag: str = "--adapter-dir") -> Path:
    """Return the folder if it exists and can be read.

    Raises:
        ArgumentsError: it does not, or cannot be.
    """
    if not os.path.isdir(folder):
        raise ArgumentsError(f"{flag} {folder} is no folder. Create it; it may be empty.")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ArgumentsError(f"{flag} {folder} may not be read. Allow it to whoever runs this.")
    return folder
