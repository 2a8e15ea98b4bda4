"""Upstream's ModelWorker, with a pool of adapters on its model and slots in which their answers are made.

Loading and the controller's side are upstream's. Answers are made in `serving/generation/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava.mm_utils import get_model_name_from_path

from llava_steering_plugin.inference.base_files import check_base
from llava_steering_plugin.inference.base_model import loading_name
from llava_steering_plugin.inference.sources import shown_base
from llava_steering_plugin.pool.pool import AdapterPool
from llava_steering_plugin.serving.catalog import AdapterCatalog
from llava_steering_plugin.serving.generation.making import Maker
from llava_steering_plugin.serving.generation.prompts import Prompts
from llava_steering_plugin.serving.generation.slots import Slots
from llava_steering_plugin.upstream.worker_seam import model_worker


class AdapterWorker(model_worker.ModelWorker):
    """Serves one base model and a pool of adapters on it; to the controller each of them is a model of its own.

    Args:
        model_path: the base, a folder or a hub id.
        controller, address: URLs of the controller and of this worker.
        model_name: the name of the base on the page; None: the one that upstream would give it.

    Raises:
        ArgumentsError: `model_path` is an adapter, or no LLaVA.
        UpstreamError: there is no model at `model_path`, or files of it are missing.
    """

    def __init__(
        self,
        model_path: str,
        *,
        controller: str,
        address: str,
        model_name: str | None = None,
        device: str = "cuda",
        load_8bit: bool = False,
        load_4bit: bool = False,
        max_resident: int | None = None,
    ):
        config = check_base(model_path, " Give the base with --model-path.")
        super().__init__(
            controller,
            address,
            model_worker.worker_id,
            True,  # no_register: the adapters are not there yet, and upstream's heart beat would outlive a shutdown
            model_path,
            None,
            loading_name(model_path, config),
            load_8bit,
            load_4bit,
            device,
        )
        self.model_name = model_name or shown_base(get_model_name_from_path(model_path), config)
        self.is_multimodal = self.image_processor is not None
        self.pool = AdapterPool(self.model, self.tokenizer, max_resident=max_resident)
        self.catalog = AdapterCatalog(self.pool, self.model_name)
        self.slots: Slots | None = None

    def get_status(self) -> dict[str, Any]:
        """Return what the controller is told: the base and every adapter are models."""
        return {**super().get_status(), "model_names": self.catalog.names()}

    def get_queue_length(self) -> int:
        """Return how many answers are being made or wait; the controller asks the worker with the fewest."""
        return len(self.slots.running) + len(self.slots.waiting) if self.slots is not None else 0

    def open_slots(self, count: int, batch: int, changed: Callable[[], None]) -> Slots:
        """Make answers from now on, in `count` slots and up to `batch` in each; for the event loop."""
        prompts = Prompts(self.pool, self.tokenizer, self.image_processor)
        self.slots = Slots(Maker(prompts, batch), count, batch, changed)
        return self.slots
