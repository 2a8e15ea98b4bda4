"""vLLM's own server as a process, or several, with our plugin found by its entry point."""

from __future__ import annotations

import base64
import io
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from ports import free_port
from vllm_fixtures import NEW, Engine, Shared

READY = "Application startup complete"
SECONDS = 600  # until the next line of its log, on a machine that does much else


@contextmanager
def served(shared: Shared, *words: str) -> Iterator[str]:
    """Serve the base with all adapters; yields the address of its API.

    Args:
        words: more of the command line.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(shared.base)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16", "--block-size", str(Engine.BLOCK)]
    command += ["--max-num-batched-tokens", str(Engine.CHUNK), "--limit-mm-per-prompt", '{"image": 2}']
    command += ["--enable-lora", "--max-loras", str(Engine.SLOTS), "--max-lora-rank", "8"]
    command += ["--lora-target-modules", "steering", "steering_tokens", *words]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in shared.adapters.items())]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(server, lines), daemon=True).start()
    try:
        said = []
        while READY not in (line := lines.get(timeout=SECONDS) or ""):
            assert line, "".join(said[-60:])
            said.append(line)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _read(server: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        lines.put(line)
    lines.put(None)


def message(text: str, *images: Image.Image) -> dict[str, Any]:
    """A user's message as the API takes it."""
    parts: list[dict[str, Any]] = []
    for image in images:
        data = io.BytesIO()
        image.save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


# Exactly as many tokens as the reference makes, by their numbers.
EXACT: dict[str, Any] = {
    "max_tokens": NEW,
    "temperature": 0,
    # vLLM tokenizes chats without <s>, as for templates that write it; LLaVA's do not, and its prompts begin with it.
    "extra_body": {"ignore_eos": True, "return_token_ids": True, "add_special_tokens": True},
}
