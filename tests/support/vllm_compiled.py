"""Answers of an engine of vLLM's that compiles the model on a CPU, which vLLM leaves out where LoRA is on.

    python tests/support/vllm_compiled.py BASE IMAGES ADAPTERS

ADAPTERS is JSON: folders by name. The last line that it prints is JSON: the answers to `prompts_of(IMAGES)`, all in one
batch, by the adapter's name, "" for the base; and what was compiled. In a process of its own, because how models are
compiled is said for all of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_fixtures import Engine, prompts_of


def compile_with_lora() -> None:
    """Let vLLM choose for the CPU as it does where LoRA is off."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def without_lora(cls: type, config: Any) -> None:
        lora, config.lora_config = config.lora_config, None
        try:
            check(cls, config)
        finally:
            config.lora_config = lora

    CpuPlatform.check_and_update_config = classmethod(without_lora)


def main(base: Path, images: Path, adapters: dict[str, str]) -> dict[str, Any]:
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter
    from vllm.lora.request import LoRARequest

    compile_with_lora()
    engine = Engine(base, enforce_eager=False, lora_target_modules=["steering", "steering_tokens"])
    requests = {name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), 1)}
    prompts, named = prompts_of(images), {"": None, **requests}
    before = compilation_counter.num_aot_compiles
    found = engine.answers([prompt for prompt in prompts for _ in named], list(named.values()) * len(prompts))
    return {
        "answers": {name: found[number :: len(named)] for number, name in enumerate(named)},
        "backend": engine.llm.llm_engine.vllm_config.compilation_config.backend,
        "models": compilation_counter.num_models_seen,
        "compiled": before,
        "compiled again": compilation_counter.num_aot_compiles - before,
        "library calls": counters["inductor"]["extern_calls"],
        "graph breaks": dict(counters["graph_break"]),
    }


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    written = main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    sys.stdout.write("\n" + json.dumps(written) + "\n")
