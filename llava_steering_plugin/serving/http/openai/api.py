"""The routes under /v1, and what they need."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.serving.http.admin import Admin, NameTaken
from llava_steering_plugin.serving.http.admission import Admission
from llava_steering_plugin.serving.http.keys import has_key
from llava_steering_plugin.serving.http.openai.chat import ChatEndpoint
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.images import ImageSources
from llava_steering_plugin.serving.http.openai.models import Models
from llava_steering_plugin.serving.http.openai.schema import LoadRequest, UnloadRequest, checked
from llava_steering_plugin.serving.http.protocol import Refused, read_object

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class ApiSettings:
    """Says how the API is offered.

    Attributes:
        key: requests have to carry it; None: no key is asked for.
        media_hosts: hosts from which images are fetched.
        media_folder: folder from which images are read; None: none.
        admin: who loads and removes adapters; None: nobody does.
    """

    key: str | None = None
    media_hosts: Sequence[str] = ()
    media_folder: Path | None = None
    admin: Admin | None = None


def routes(settings: ApiSettings, worker: AdapterWorker, admission: Admission, log_requests: bool) -> list[Route]:
    """Return the routes for the worker's application."""
    models = Models(worker)
    images = ImageSources(settings.media_hosts, settings.media_folder, most=admission.limits.body_bytes)
    key = settings.key.encode(errors="surrogateescape") if settings.key is not None else None

    def check(request: Request) -> None:
        if key is not None and not has_key(request, key):
            raise ApiError(401, "This needs the server's API key: Authorization: Bearer KEY.")

    async def list_models(request: Request) -> Response:
        check(request)
        return JSONResponse({"object": "list", "data": models.listed()})

    async def one_model(request: Request) -> Response:
        check(request)
        model = models.find(request.path_params["name"])
        [found] = [each for each in models.listed() if models.find(each["id"]).adapter == model.adapter]
        return JSONResponse(found)

    chat = ChatEndpoint(worker, admission, models, images, check, log_requests=log_requests)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", _guarded(list_models), methods=["GET"]),
        Route("/v1/models/{name:path}", _guarded(one_model), methods=["GET"]),
        *(_adapter_routes(settings.admin, admission) if settings.admin is not None else ()),
    ]


def _adapter_routes(admin: Admin, admission: Admission) -> list[Route]:
    """Return the routes by which an administrator changes adapters, in vLLM's spelling."""

    def check(request: Request) -> None:
        if not admin.permits(request):
            raise ApiError(401, "This needs the admin token: Authorization: Bearer TOKEN.", code="invalid_admin_token")

    async def load(request: Request) -> Response:
        check(request)
        asked = checked(LoadRequest, await read_object(request, admission.limits))
        if "\0" in asked.lora_path:
            raise ApiError(400, "lora_path is no path.", param="lora_path")
        try:
            await admin.load(asked.lora_name, asked.lora_path, replace=asked.load_inplace)
        except NameTaken as taken:
            said = 'There is an adapter of that name; "load_inplace": true replaces it.'
            raise ApiError(400, said, code="adapter_exists", param="lora_name") from taken
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(request: Request) -> Response:
        check(request)
        asked = checked(UnloadRequest, await read_object(request, admission.limits))
        await admin.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return [
        Route("/v1/load_lora_adapter", _guarded(load), methods=["POST"]),
        Route("/v1/unload_lora_adapter", _guarded(unload), methods=["POST"]),
    ]


def _guarded(answer: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        try:
            return await answer(request)
        except Refused as refused:
            error = ApiError.of(refused)
        except SteeringError as raised:
            error = ApiError(400, f"{type(raised).__name__}: {raised}", code="adapter_refused")
        except ClientDisconnect:
            error = ApiError(400, "The client left.", code="client_left")
        logger.info("%s refused with %d (%s)", request.url.path, error.status, error.code)
        return error.response()

    return guarded
