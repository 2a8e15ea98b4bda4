"""Run a worker for the benchmark of requests: a random LLaVA in float32 whose answers all have the asked length.

    python scripts/benchmarks/serving_worker.py BASE ADAPTERS PORT BATCH

`python scripts/benchmarks serving --clients` starts it, once with batches and once without. It ends with its standard
input, and so with the benchmark, also with one that is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import uvicorn


def main(base: str, adapters: str, port: int, batch: int) -> None:
    """Serve the adapters in a folder until the process is ended."""
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.limits import Limits
    from llava_steering_plugin.serving.idle_memory import keep_few_operations
    from llava_steering_plugin.serving.model_worker import AdapterWorker

    keep_few_operations()
    address = f"http://127.0.0.1:{port}"
    worker = AdapterWorker(base, controller="http://127.0.0.1:9", address=address, device="cpu")
    worker.model.float()
    worker.model.generation_config.eos_token_id = None
    for folder in sorted(Path(adapters).iterdir()):
        worker.catalog.put(folder.name, str(folder))
    config = uvicorn.Config(build(worker, Limits(batch=batch)), "127.0.0.1", port, log_config=None, access_log=False)
    threading.Thread(target=_end_with_input, daemon=True).start()
    uvicorn.Server(config).run()


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which holds names of its own
    logging.basicConfig(level=logging.ERROR)
    torch.set_grad_enabled(False)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
