"""Measure a worker's answers to 1, 4 and 16 clients at once, over eight adapters, with batches and without.

Two workers run, one with `--batch 1` and one with `--batch 8`, in float32 on one random LLaVA with six adapters of
MoReS and two of MixLoRA. In every round each of them answers the same requests, in turns; the other one is idle then.
A client sends its requests one after the other, three of four with an image. All answers have the asked number of
tokens: 48 or, in a second run, 8 to 64. What is compared is the ratio of a round: tokens of all answers a second, the
time until a client's first token has come, and the worker's processor time for a token, with which other processes
interfere least.

The control is the worker without batches, asked a second time in every round by 1 and by 4 clients: what its ratios
differ from 1 is noise. A target counts as met where its median misses it by no more than that.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import requests
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from llava_steering_plugin import attach, remove, save_adapter
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

from .serving_targets import compared, ratios_of, table_of_targets, targets
from .shared.machine import open_console, prepare
from .shared.random_llava import WORDS, Shape, save, save_tokenizer
from .shared.verdicts import table_of, write_json

BATCHES = (1, 8)
CLIENTS = (1, 4, 16)
# Tokens of an answer. A batch takes as long as its longest one, so the gain of unequal ones is not judged.
EQUAL, UNEQUAL = "answers of 48 tokens", "answers of 8 to 64 tokens"
LENGTHS = {EQUAL: (48, 48), UNEQUAL: (8, 64)}
SMALL = Shape("7 M parameters", 256, 704, 8, 4, 0, 128, 256, 2, 2, 112, 14)
LARGE = Shape("120 M parameters", 576, 1536, 30, 9, 0, 128, 256, 2, 2, 112, 14)
MODES: dict[str, Mode] = {f"mores-{number}": MoReS(rank=1, tokens="all") for number in range(6)}
MODES |= {f"mixlora-{number}": MixLoRA(factors=4, rank=2) for number in range(2)}
CONTROLLED = (1, 4)


@dataclass(frozen=True)
class Workload:
    """One model, and what is asked of it.

    Attributes:
        least, most: numbers of rounds.
        seconds: after which no round begins once there have been `least`.
        each: the requests that each client sends in a round, by the number of clients.
    """

    shape: Shape
    lengths: str
    least: int
    most: int
    seconds: float
    each: dict[int, int]


# Made for a quarter of an hour on two quiet cores.
FULL = (
    Workload(SMALL, EQUAL, 3, 9, 150, {1: 2, 4: 2, 16: 1}),
    Workload(SMALL, UNEQUAL, 3, 5, 60, {1: 2, 4: 2, 16: 1}),
    Workload(LARGE, EQUAL, 3, 5, 300, {1: 1, 4: 1, 16: 1}),
)
QUICK = (Workload(SMALL, UNEQUAL, 1, 1, 0, {1: 1, 4: 1, 16: 1}),)


@dataclass(frozen=True)
class Round:
    """What one worker did in one round.

    Attributes:
        rate: tokens of all answers a second.
        first: median seconds from a request to its first token.
        processor: seconds of processor time for a token.
    """

    rate: float
    first: float
    processor: float


def make_model(shape: Shape, folder: Path, modes: Mapping[str, Mode] = MODES, strength: float = 0.02) -> None:
    """Write a random LLaVA in `folder` / llava-v1.5-random, and adapters with noise in `folder` / adapters."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    torch.manual_seed(0)
    base = folder / "llava-v1.5-random"
    base.mkdir()
    # LLaVA's loader cuts the vocabulary to that of the tokenizer.
    save(replace(shape, vocabulary=len(save_tokenizer(base))), base, folder / "tower")
    model = LlavaLlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    model.float()
    for name, mode in modes.items():
        attachment = attach(model, mode)
        with torch.no_grad():
            for parameter in attachment.parameters().values():
                parameter.add_(torch.randn_like(parameter), alpha=strength)
        save_adapter(model, folder / "adapters" / name)
        remove(model)


@contextmanager
def running(folder: Path, batch: int, threads: int) -> Iterator[str]:
    """Run a worker; yield its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("serving_worker.py")
    words = [folder / "llava-v1.5-random", folder / "adapters", port, batch]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(script), *map(str, words)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)  # the worker ends with it
    try:
        address = f"http://127.0.0.1:{port}"
        while not _answers(address):
            if process.poll() is not None:
                raise SystemExit(f"the worker with --batch {batch} has ended with {process.returncode}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.exceptions.ConnectionError:
        return False


def questions(count: int, seed: int, names: Sequence[str], lengths: str = UNEQUAL) -> list[dict[str, Any]]:
    """Return the bodies of requests to the models of these names in turn."""
    chance = random.Random(seed)
    file = io.BytesIO()
    Image.effect_noise((112, 112), 90).convert("RGB").save(file, "JPEG")
    image = base64.b64encode(file.getvalue()).decode()
    found = []
    for number in range(count):
        images = [image] if number % 4 != 3 else []
        words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(5, 40)))
        found.append(
            {
                "model": names[(number + seed) % len(names)],
                "prompt": f"USER: {'<image> ' * len(images)}{words} ASSISTANT:",
                "images": images,
                "temperature": 0.0,
                "max_new_tokens": chance.randint(*LENGTHS[lengths]),
                "stop": "</s>",
            }
        )
    return found


def one_round(address: str, clients: int, bodies: Sequence[dict[str, Any]], process: psutil.Process) -> Round:
    """Let clients ask at once, each its share of the requests, and wait for all answers."""
    before = _processor(process)
    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as users:
        shares = [bodies[number::clients] for number in range(clients)]
        firsts = [first for share in users.map(functools.partial(_ask_all, address), shares) for first in share]
    seconds = time.perf_counter() - begun
    tokens = sum(body["max_new_tokens"] for body in bodies)
    return Round(tokens / seconds, statistics.median(firsts), (_processor(process) - before) / tokens)


def _ask_all(address: str, bodies: Sequence[dict[str, Any]]) -> list[float]:
    return [_ask(address, body) for body in bodies]


def _ask(address: str, body: dict[str, Any]) -> float:
    """Return the seconds to the first token of an answer, which is read to its end."""
    begun = time.perf_counter()
    first: float | None = None
    state: dict[str, Any] = {"error_code": None}
    with requests.post(f"{address}/worker_generate_stream", json=body, stream=True, timeout=600) as response:
        for part in response.iter_lines(chunk_size=1 << 14, delimiter=b"\0"):
            if part:
                first = time.perf_counter() if first is None else first
                state = json.loads(part)
    if state["error_code"] != 0 or first is None:
        raise SystemExit(f"no answer: {response.status_code} {state}")
    return first - begun


def _processor(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(work: Workload, threads: int, console: Console) -> dict[str, Any]:
    """Measure one model; return its part of the JSON."""
    shape, lengths = work.shape, work.lengths
    console.rule(f"{shape.name}, {lengths}", align="left")
    again: dict[int, list[Round]] = {clients: [] for clients in CONTROLLED}
    found: dict[int, dict[int, list[Round]]] = {clients: {batch: [] for batch in BATCHES} for clients in CLIENTS}
    with tempfile.TemporaryDirectory(prefix="bench-requests-") as scratch:
        folder = Path(scratch)
        make_model(shape, folder)
        with running(folder, BATCHES[0], threads) as single, running(folder, BATCHES[1], threads) as batched:
            addresses = dict(zip(BATCHES, (single, batched), strict=True))
            workers = {batch: (address, process_of(address)) for batch, address in addresses.items()}
            listed = requests.post(f"{single}/worker_get_status", timeout=5).json()["model_names"]
            adapters = listed[1:]  # the base comes first
            for address, process in workers.values():
                one_round(address, 8, questions(8, 0, adapters), process)
            begun, number = time.perf_counter(), 0
            while number < work.least or (number < work.most and time.perf_counter() - begun < work.seconds):
                for clients in CLIENTS:
                    bodies = questions(clients * work.each[clients], number, adapters, lengths)
                    for batch in BATCHES if number % 2 else BATCHES[::-1]:
                        address, process = workers[batch]
                        found[clients][batch].append(one_round(address, clients, bodies, process))
                    if clients in CONTROLLED:
                        address, process = workers[BATCHES[0]]
                        again[clients].append(one_round(address, clients, bodies, process))
                number += 1
    console.print(_table(found))
    return {
        "shape": shape.name,
        "lengths": lengths,
        "clients": {
            clients: {
                **{f"batch {batch}": [vars(each) for each in rounds] for batch, rounds in of.items()},
                **compared(of[BATCHES[0]], of[BATCHES[1]]),
                "control": compared(of[BATCHES[0]], again[clients]) if clients in again else None,
            }
            for clients, of in found.items()
        },
    }


def process_of(address: str) -> psutil.Process:
    """Return the child that listens at an address."""
    port = int(address.rpartition(":")[2])
    children = psutil.Process().children()
    return next(
        child
        for child in children
        if any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in child.net_connections())
    )


def _table(found: dict[int, dict[int, list[Round]]]) -> Table:
    kinds = {"rate": ("tokens/s", 1.0), "first": ("first token, ms", 1e3), "processor": ("processor, ms a token", 1e3)}
    columns = ["clients", *(word for title, _ in kinds.values() for word in (f"{title}: batch 1", "batch 8", "ratio"))]
    table = table_of("medians of the rounds, the range of their ratios in brackets", columns)
    for clients, of in found.items():
        cells = [str(clients)]
        for name, (_, unit) in kinds.items():
            medians = [statistics.median(getattr(each, name) for each in of[batch]) for batch in BATCHES]
            cells += [f"{unit * median:,.{0 if unit * median >= 100 else 1}f}" for median in medians]
            ratios = ratios_of(of[BATCHES[0]], of[BATCHES[1]], name)
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        table.add_row(*cells)
    return table


def run(quick: bool, json_file: Path | None, threads: int) -> int:
    """Run the benchmark; return its exit status. A quick run is not judged: it has one round."""
    console = open_console()
    about = {**prepare(threads, "float32", quick), "clock": "wall clock"}
    console.print(about)
    results = [measured(work, threads, console) for work in (QUICK if quick else FULL)]
    judged = [] if quick else targets([each for each in results if each["lengths"] == EQUAL])
    if judged:
        console.print(table_of_targets(judged))
    passed = all(target.met for target in judged)
    if json_file is not None:
        found = [{**vars(target), "verdict": target.verdict} for target in judged]
        write_json(json_file, {"machine": about, "results": results, "targets": found, "passed": passed})
    return 0 if passed else 1
