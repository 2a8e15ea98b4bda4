"""The models of the API: the base, and every adapter under its own name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.errors import SteeringError, nearest
from llava_steering_plugin.inference.sources import template_on_page
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.upstream.text.conversations import checked_template, template_of_base

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker


@dataclass(frozen=True)
class Model:
    """A model that can be asked.

    Attributes:
        id: its name in the API.
        adapter: its name in the pool.
        template: the name of its conversation template.
        recorded: the one that the adapter records; None: it records none.
    """

    id: str
    adapter: str
    template: str
    recorded: str | None


class Models:
    """Finds models and lists them.

    An adapter is called by the name that it was given; the name that LLaVA's page shows will do, too. Where a name is
    both, it is the base's before that of an adapter, and an adapter's own before one that the page shows.
    """

    def __init__(self, worker: AdapterWorker):
        self._worker = worker
        self._started = int(time.time())

    def find(self, name: str) -> Model:
        """Return the model of that name.

        Raises:
            ApiError: there is none (404), or nobody knows how to prompt it (400).
        """
        catalog = self._worker.catalog
        adapters = catalog.adapters()
        names = {adapter.shown: adapter.name for adapter in adapters}
        names |= {adapter.name: adapter.name for adapter in adapters} | {catalog.base: BASE}
        try:
            if (adapter := names.get(name)) is not None:
                recorded = self._worker.pool.details(adapter).conversation
                return Model(name, adapter, self._template(adapter, recorded), recorded)
        except SteeringError as error:
            if adapter == BASE or adapter in self._worker.pool.names():
                raise ApiError(400, f"This model cannot be prompted: {error}", param="model") from error
        hint = nearest(name, [each["id"] for each in self.listed()]) if len(name) <= 200 else ""
        raise ApiError(
            404, f"There is no model of that name here: {hint}GET /v1/models lists those there are.", param="model"
        )

    def listed(self) -> list[dict[str, Any]]:
        """Return the base and every adapter as OpenAI lists models, with vLLM's `root` and `parent`."""
        base = self._worker.catalog.base
        path = Path(str(self._worker.model.config._name_or_path).rstrip("/"))
        adapters = [
            self._entry(adapter.id, Path(adapter.source).name, base) for adapter in self._worker.catalog.adapters()
        ]
        return [self._entry(base, path.name, None), *adapters]

    def _entry(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "llava-steering",
            "root": root,
            "parent": parent,
        }

    def _template(self, adapter: str, recorded: str | None) -> str:
        """Return the template of an adapter; of the base, and where none is recorded, that of the page or the type."""
        if recorded is not None:
            return checked_template(recorded, adapter)
        of_type = template_of_base(self._worker.model.config.to_dict())
        return checked_template(of_type or template_on_page(self._worker.catalog.base))
