"""Keeps requests to this machine away from proxies.

With `http_proxy` in the environment, requests, httpx and urllib send every request to that proxy, also those to
127.0.0.1, unless `no_proxy` names the host. The programs of the server and upstream's code in them speak to each other
over localhost, which no proxy reaches.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

import requests

# Names of this machine that all three libraries take in `no_proxy`. No "::1": httpx up to 0.24 fails at it.
LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8")
# What `no_proxy` is in programs that speak to this machine only.
EVERYTHING = {"no_proxy": "*", "NO_PROXY": "*"}


def is_loopback(host: str) -> bool:
    """Return whether a host name or address, an IPv6 one with or without brackets, stands for this machine alone."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def host_of(url: str) -> str:
    """Return the host of a URL, in lower case and without brackets; the empty string if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def bypassing(environment: Mapping[str, str], *urls: str) -> dict[str, str]:
    """Return the variables with which a process reaches this machine without a proxy.

    Args:
        environment: where the present `no_proxy` is, which is kept and added to.
        urls: addresses that the process calls; those of this machine are added by their own names.
    """
    before = environment.get("no_proxy") or environment.get("NO_PROXY") or ""  # the order in which all libraries look
    if before.strip() == "*":
        return dict(EVERYTHING)
    known = [name for name in (part.strip() for part in before.split(",")) if name]
    names = dict.fromkeys([*known, *LOOPBACK, *filter(is_loopback, map(host_of, urls))])
    return dict.fromkeys(EVERYTHING, ",".join(names))


def bypass_proxies(*urls: str) -> None:
    """Make this process reach this machine without a proxy; see `bypassing`."""
    os.environ.update(bypassing(os.environ, *urls))


def call(method: str, url: str, seconds: float = 5) -> requests.Response | None:
    """Call an address of this machine, whatever proxies the environment names; return the answer if its status is 200.

    Args:
        seconds: to wait for it.
    """
    with requests.Session() as session:
        session.trust_env = False
        try:
            response = session.request(method, url, timeout=seconds)
        except requests.exceptions.RequestException:
            return None
        return response if response.status_code == 200 else None
