"""Measure a worker's answers to 1, 4 and 16 clients at once, over eight adapters, with batches and without.

Two workers run, one with `--batch 1` and one with `--batch 8`, in float32 on one random LLaVA with six adapters of
MoReS and two of MixLoRA. In every round each of them answers the same requests, in turns; the other one is idle then.
A client sends its requests one after the other, three of four with an image. All answers have the asked number of
tokens: 48 or, in a second run, 8 to 64. What is compared is the ratio of a round: tokens of all answers a second, the
time until a client's first token has come, and the worker's processor time for a token, with which other processes
interfere least.
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
from collections.abc import Iterator, Sequence
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

from .shared.machine import open_console, prepare
from .shared.random_llava import WORDS, Shape, save, save_tokenizer
from .shared.verdicts import Verdict, table_of, table_of_verdicts, write_json

BATCHES = (1, 8)
CLIENTS = (1, 4, 16)
# Tokens of an answer. A batch takes as long as its longest one, so the gain of unequal ones is not judged.
EQUAL, UNEQUAL = "answers of 48 tokens", "answers of 8 to 64 tokens"
LENGTHS = {EQUAL: (48, 48), UNEQUAL: (8, 64)}
SMALL = Shape("7 M parameters", 256, 704, 8, 4, 0, 128, 256, 2, 2, 112, 14)
LARGE = Shape("120 M parameters", 576, 1536, 30, 9, 0, 128, 256, 2, 2, 112, 14)
MODES: dict[str, Mode] = {f"mores-{number}": MoReS(rank=1, tokens="all") for number in range(6)}
MODES |= {f"mixlora-{number}": MixLoRA(factors=4, rank=2) for number in range(2)}
# What is asked of the medians.
LEAST_GAIN, LEAST_ALONE, MOST_LATER = 3.0, 0.95, 1.05


@dataclass(frozen=True)
class Workload:
    """Models, rounds, and the requests that each client sends in a round, by the number of clients."""

    shapes: tuple[Shape, ...]
    lengths: tuple[str, ...]
    rounds: int
    each: dict[int, int]


FULL = Workload((SMALL, LARGE), (EQUAL, UNEQUAL), rounds=5, each={1: 2, 4: 2, 16: 1})
QUICK = Workload((SMALL,), (UNEQUAL,), rounds=1, each={1: 1, 4: 1, 16: 1})


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


def make_model(shape: Shape, folder: Path) -> None:
    """Write a random LLaVA in `folder` / base, and its adapters in `folder` / adapters."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    torch.manual_seed(0)
    base = folder / "llava-v1.5-random"
    base.mkdir()
    # LLaVA's loader cuts the vocabulary to that of the tokenizer.
    save(replace(shape, vocabulary=len(save_tokenizer(base))), base, folder / "tower")
    model = LlavaLlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    model.float()
    for name, mode in MODES.items():
        attachment = attach(model, mode)
        with torch.no_grad():
            for parameter in attachment.parameters().values():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
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
    process = subprocess.Popen([sys.executable, str(script), *map(str, words)], env=environment)
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


def measured(shape: Shape, lengths: str, work: Workload, threads: int, console: Console) -> dict[str, Any]:
    """Measure one model; return its part of the JSON."""
    console.rule(f"{shape.name}, {lengths}", align="left")
    found: dict[int, dict[int, list[Round]]] = {clients: {batch: [] for batch in BATCHES} for clients in CLIENTS}
    with tempfile.TemporaryDirectory(prefix="bench-requests-") as scratch:
        folder = Path(scratch)
        make_model(shape, folder)
        with running(folder, BATCHES[0], threads) as single, running(folder, BATCHES[1], threads) as batched:
            addresses = dict(zip(BATCHES, (single, batched), strict=True))
            workers = {batch: (address, _process_of(address)) for batch, address in addresses.items()}
            listed = requests.post(f"{single}/worker_get_status", timeout=5).json()["model_names"]
            adapters = listed[1:]  # the base comes first
            for address, process in workers.values():
                one_round(address, 8, questions(8, 0, adapters), process)
            for number in range(work.rounds):
                for clients in CLIENTS:
                    bodies = questions(clients * work.each[clients], number, adapters, lengths)
                    for batch in BATCHES if number % 2 else BATCHES[::-1]:
                        address, process = workers[batch]
                        found[clients][batch].append(one_round(address, clients, bodies, process))
    console.print(_table(found))
    return {
        "shape": shape.name,
        "lengths": lengths,
        "clients": {
            clients: {
                **{f"batch {batch}": [vars(each) for each in rounds] for batch, rounds in of.items()},
                "gain": _ratios(of, "rate"),
                "later": _ratios(of, "first"),
                "processor": _ratios(of, "processor"),
            }
            for clients, of in found.items()
        },
    }


def _process_of(address: str) -> psutil.Process:
    port = int(address.rpartition(":")[2])
    children = psutil.Process().children()
    return next(
        child
        for child in children
        if any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in child.net_connections())
    )


def _ratios(of: dict[int, list[Round]], name: str) -> list[float]:
    """Return what the worker with batches has, over what the one without has, of each round."""
    return [getattr(new, name) / getattr(old, name) for old, new in zip(of[BATCHES[0]], of[BATCHES[1]], strict=True)]


def _table(found: dict[int, dict[int, list[Round]]]) -> Table:
    kinds = {"rate": ("tokens/s", 1.0), "first": ("first token, ms", 1e3), "processor": ("processor, ms a token", 1e3)}
    columns = ["clients", *(word for title, _ in kinds.values() for word in (f"{title}: batch 1", "batch 8", "ratio"))]
    table = table_of("medians of the rounds, the range of their ratios in brackets", columns)
    for clients, of in found.items():
        cells = [str(clients)]
        for name, (_, unit) in kinds.items():
            medians = [statistics.median(getattr(each, name) for each in of[batch]) for batch in BATCHES]
            cells += [f"{unit * median:,.{0 if unit * median >= 100 else 1}f}" for median in medians]
            ratios = _ratios(of, name)
            cells.append(f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        table.add_row(*cells)
    return table


def verdicts(results: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Judge the medians of equal answers; a gain is judged by its inverse, so that small is good."""
    found = []
    for result in (each for each in results if each["lengths"] == EQUAL):
        for clients, of in result["clients"].items():
            gain, later = statistics.median(of["gain"]), statistics.median(of["later"])
            what = f"{result['shape']}, {clients} at once"
            if clients == 1:
                found.append(Verdict(f"{what}: time of a token, of that without batches", 1 / gain, 1 / LEAST_ALONE))
            if clients == 16:
                found.append(Verdict(f"{what}: time of a token, of that without batches", 1 / gain, 1 / LEAST_GAIN))
            if clients > 1:
                found.append(Verdict(f"{what}: time to the first token, of that without batches", later, MOST_LATER))
    return found


def run(quick: bool, json_file: Path | None, threads: int) -> int:
    """Run the benchmark; return its exit status. A quick run is not judged: it has one round."""
    console = open_console()
    work = QUICK if quick else FULL
    about = {**prepare(threads, "float32", quick), "clock": "wall clock"}
    console.print(about)
    results = [measured(shape, lengths, work, threads, console) for shape in work.shapes for lengths in work.lengths]
    judged = [] if quick else verdicts(results)
    if judged:
        console.print(table_of_verdicts(judged))
    passed = all(verdict.passed for verdict in judged)
    if json_file is not None:
        write_json(json_file, {"machine": about, "results": results, "verdicts": judged, "passed": passed})
    return 0 if passed else 1
