"""vLLM's own server as a process, or several, as `llava-steering serve --engine vllm` starts it."""

from __future__ import annotations

import base64
import io
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import Image
from ports import free_port
from vllm_fixtures import NEW, Engine, Shared

from llava_steering_plugin.serving.options import KEY_VARIABLE, TOKEN_VARIABLE

READY = "Application startup complete"
SECONDS = 600  # until the next line of its log, on a machine that does much else
KEY, TOKEN = "a-key-for-the-api-of-tests", "a-token-for-the-admin-of-tests"


@contextmanager
def served(shared: Shared, *words: str) -> Iterator[str]:
    """Serve the base with all adapters as `llava-steering serve` does; yields the address of its API.

    Args:
        words: more flags of vLLM's.
    """
    port = free_port()
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16", *words]
    flags += ["--block-size", str(Engine.BLOCK), "--max-num-batched-tokens", str(Engine.CHUNK)]
    flags += ["--limit-mm-per-prompt", '{"image": 2}']
    command = [sys.executable, "-m", "llava_steering_plugin", "serve", "--engine", "vllm", str(shared.base)]
    command += ["--model-name", "base", "--worker-port", str(port), "--max-resident", str(Engine.SLOTS)]
    command += ["--admin-any-path", "--vllm-flags", shlex.join(flags)]
    command += ["--adapters", *(f"{name}={folder}" for name, folder in shared.adapters.items())]
    environment = os.environ | {KEY_VARIABLE: KEY, TOKEN_VARIABLE: TOKEN, "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(server, lines), daemon=True).start()
    ended = False
    try:
        said = []
        while READY not in (line := lines.get(timeout=SECONDS) or ""):
            assert line, "".join(said[-60:])
            said.append(line)
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()  # this one alone: it ends all others
        server.wait(60)
        while lines.get(timeout=60) is not None:  # the last process that could write has ended
            pass
        ended = True
    finally:
        if not ended:
            with suppress(ProcessLookupError):
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
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}
