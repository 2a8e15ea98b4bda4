"""Compares what a request carries as `Authorization: Bearer KEY` with a secret."""

from __future__ import annotations

import hmac

from starlette.requests import Request


def has_key(request: Request, key: bytes) -> bool:
    """Return whether a request carries a key. The time that it takes reveals nothing of the key."""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Both are compared in every case. Latin-1 restores the bytes that were sent.
    right = hmac.compare_digest(given.encode("latin-1"), key)
    return right & (kind.lower() == "bearer")
