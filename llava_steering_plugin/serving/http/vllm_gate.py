"""Stands in front of vLLM's server as `llava-steering serve` starts it: whose requests it takes, and with which key.

vLLM makes it without arguments, by its flag --middleware; secrets and names come in the environment.
"""

from __future__ import annotations

import os

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_steering_plugin.serving.http.access import HostCheck
from llava_steering_plugin.serving.http.keys import has_key
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.options import KEY_VARIABLE, TOKEN_VARIABLE

GATE = f"{__name__}.Gate"
HOSTS_VARIABLE = "LLAVA_STEERING_ALLOWED_HOSTS"
OPEN = frozenset({"/health", "/ping", "/metrics", "/version", "/load"})
# Parts of the addresses at which adapters are loaded and unloaded; the second is SageMaker's spelling.
CHANGES = ("lora_adapter", "/adapters")


class Gate:
    """Asks for the admin token where adapters are changed, and for the key everywhere else but at a few open addresses.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: ASGIApp):
        self._token = os.environ.get(TOKEN_VARIABLE, "").encode()
        self._key = os.environ.get(KEY_VARIABLE, "").encode()
        self._app = app
        self._checked = HostCheck(self._behind, os.environ.get(HOSTS_VARIABLE, "").split())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._checked(scope, receive, send)

    async def _behind(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self._key:
            await send({"type": "websocket.close", "code": 1008})  # browsers cannot send a key with one
        elif scope["type"] != "http" or (error := self._refusal(Request(scope))) is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        path = request.url.path
        if any(part in path for part in CHANGES):
            if not self._token:
                return ApiError(404, f"There is no {path} here: it takes an admin token.", code="not_found")
            if not has_key(request, self._token):
                return ApiError(401, "This needs the admin token, as `Authorization: Bearer TOKEN`.")
        elif self._key and request.method != "OPTIONS" and path not in OPEN and not has_key(request, self._key):
            return ApiError(401, "This needs the key of the API, as `Authorization: Bearer KEY`.")
        return None
