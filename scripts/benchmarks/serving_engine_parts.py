"""Make what the benchmark of vLLM compares: a base in both layouts, adapters, and the process with vLLM's engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava_steering_plugin.modes.mores import MoReS

from .serving_requests import make_model
from .shared.random_llava import Shape

MOST, LORAS = 32, 8  # adapters of MoReS, and LoRAs of PEFT's
STEERING, LINEARS = "steering", "linears"  # vLLM's engines, by where they have slots
LORA_RANK = 8
Prompt = tuple[str, int, int | None]
LAST_LINES = 15


def vllms_python() -> Path:
    """Return where the interpreter of the environment with vLLM is, or would be."""
    root = Path(__file__).resolve().parents[2]
    return Path(f"{Path(os.environ.get('VENV', root / '.venv')).absolute()}-vllm") / "bin/python"


def make_all(shape: Shape, folder: Path) -> dict[str, Any]:
    """Write the base in both layouts and all adapters; return vLLM's engines as serving_engine_vllm.py takes them.

    LLaVA's layout and the adapters of MoReS are where `serving_requests.running` finds them.
    """
    modes = {f"mores-{number:02}": MoReS(rank=4, tokens="all") for number in range(MOST)}
    make_model(shape, folder, modes, strength=0.3)
    base = folder / "exported"
    command = [sys.executable, "-m", "llava_steering_plugin", "export", str(folder / "llava-v1.5-random"), str(base)]
    command += ["--conversation", "vicuna_v1", "--no-logits"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"llava-steering export has ended with {done.returncode}:\n{_last_lines(done.stdout)}")
    loras = [save_lora(shape, number, folder / "loras" / str(number)) for number in range(LORAS)]
    mores = sorted((folder / "adapters").iterdir())
    return {
        STEERING: _engine(base, mores, max_lora_rank=8, lora_target_modules=["steering", "steering_tokens"]),
        LINEARS: _engine(base, loras, max_lora_rank=LORA_RANK, lora_target_modules=sorted(_linears(shape))),
    }


def _engine(base: Path, adapters: Sequence[Path], **settings: Any) -> dict[str, Any]:
    settings |= {
        "max_loras": len(adapters),
        "max_cpu_loras": len(adapters) + 1,  # one more: that of the check at the start
        "max_model_len": 512,
        "max_num_seqs": MOST,
        "max_num_batched_tokens": 1024,
        "enforce_eager": True,
    }
    return {"base": str(base), "settings": settings, "adapters": [str(folder) for folder in adapters]}


def _linears(shape: Shape) -> dict[str, tuple[str, int, int]]:
    """Return the block, the inputs and the outputs of every linear of a decoder layer, by its name."""
    width, inner = shape.width, shape.inner
    found = {f"{name}_proj": ("self_attn", width, width) for name in "qkvo"}
    found |= {f"{name}_proj": ("mlp", width, inner) for name in ("gate", "up")}
    return found | {"down_proj": ("mlp", inner, width)}


def save_lora(shape: Shape, seed: int, folder: Path) -> Path:
    """Write a random LoRA over all linears of the decoder, as PEFT does; return its folder."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number in range(shape.layers):
        for name, (block, inputs, outputs) in _linears(shape).items():
            path = f"base_model.model.language_model.model.layers.{number}.{block}.{name}"
            factors[f"{path}.lora_A.weight"] = 0.05 * torch.randn(LORA_RANK, inputs, generator=generator)
            factors[f"{path}.lora_B.weight"] = 0.05 * torch.randn(outputs, LORA_RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "bias": "none"}
    config["target_modules"] = sorted(_linears(shape))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Engines:
    """The process with vLLM's engines.

    Attributes:
        about: the versions that it has.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self._process, self._log = process, log
        self.about = self._read()

    def ask(self, engine: str, groups: Sequence[Sequence[Prompt]], tokens: int) -> tuple[float, list[list[int]]]:
        """Return the seconds that an engine takes for groups of prompts, one after the other, and its answers."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as the answer that is missing will say
            self._process.stdin.write(json.dumps({"engine": engine, "groups": groups, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        found = self._read()
        if any(len(answer) != tokens for answer in found["answers"]):
            raise SystemExit(f"vLLM's answers have {sorted({*map(len, found['answers'])})} tokens, not {tokens}")
        return found["seconds"], found["answers"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status, said = self._process.wait(), self._log.read_text(errors="replace")
            raise SystemExit(f"the process with vLLM has ended with {status}; its last lines:\n{_last_lines(said)}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def running_engines(python: Path, engines: dict[str, Any], threads: int, folder: Path) -> Iterator[Engines]:
    """Run vLLM's engines in a process of their own; yield it once they answer.

    Args:
        python: `vllms_python()`.
        engines: what `make_all` returns.
        folder: for the log.
    """
    script, log = Path(__file__).with_name("serving_engine_vllm.py"), folder / "vllm.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # to compile all of vLLM again takes most of a minute
    with log.open("w") as written:
        process = subprocess.Popen(
            [python, script, json.dumps(engines)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
        )
    try:
        yield Engines(process, log)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LAST_LINES:])
