"""Errors as OpenAI's object, which its clients turn into exceptions by their status."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from llava_steering_plugin.serving.http.protocol import Refused, refusal

PREFIX = "/v1/"
RETRY_SECONDS = 5
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "model_not_found",
    408: "request_timeout",
    413: "request_too_large",
    503: "queue_full",
}
# Of addresses, not of models.
NOT_THERE = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Refused):
    """A request under /v1 that is answered with an error.

    Attributes:
        code: a word for programs, OpenAI's own where it has one; None: there is none.
        param: the field that is wrong; None: it is not one field.
    """

    def __init__(self, status: int, text: str, *, code: str | None = None, param: str | None = None):
        super().__init__(status, text)
        self.code = code if code is not None else CODES.get(status)
        self.param = param

    @classmethod
    def of(cls, refused: Refused) -> ApiError:
        """Return a refusal of the worker's as one of the API."""
        if isinstance(refused, cls):
            return refused
        return cls(400 if refused.status == 422 else refused.status, refused.text)  # OpenAI has one status for both

    def body(self) -> dict[str, Any]:
        """Return the object: `{"error": {"message", "type", "param", "code"}}`."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the answer."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status == 503 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refusal_at(path: str, status: int, text: str) -> Response:
    """Return an error in the form that is read at an address: OpenAI's under /v1, else upstream's."""
    if path.startswith(PREFIX):
        return ApiError(status, text, code=NOT_THERE.get(status)).response()
    return refusal(status, text)
